"""Addresses of files that open without the key: signed, for one file, and until an end."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from starlette.types import Scope

from safelight import media
from safelight.errors import StateDirectoryError
from safelight.serving.directories import write_private
from safelight.serving.http.errors import AddressError, ExpiredAddressError

KEY_NAME = "address_key"
KEY_BYTES = 32
EXPIRES, SIGNATURE = "expires", "signature"
"""What an address has in its query beside what the route takes."""
_PATHS = re.compile(r"/v1/(jobs|videos)/[^/]+/content")
"""Routes that are opened so."""


class Addresses:
    """Signs addresses, and judges those that bear a signature.

    Args:
        key: a secret of the server's own, which has nothing to do with what clients are given.
        clock: seconds since 1970, of which those are counted that have passed in any case.

    """

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        self._key, self._clock = key, clock

    def signed(self, path: str, query: Mapping[str, str], end: float) -> str:
        """Return a path and query that open without a key until `end`, in seconds since 1970."""
        pairs = [*query.items(), (EXPIRES, str(math.ceil(end)))]
        return f"{path}?{urlencode([*pairs, (SIGNATURE, self._signature(path, pairs))])}"

    def judges(self, scope: Scope) -> bool:
        """Say whether a request bears a signature, so that `check` decides on it and no key does."""
        opened = scope["method"] == "GET" and _PATHS.fullmatch(scope["path"]) is not None
        return opened and SIGNATURE in dict(_pairs(scope))

    def check(self, scope: Scope) -> None:
        """Refuse a request with a signature, unless this server signed it, and it has not ended.

        Raises:
            AddressError: saying which.

        """
        pairs = _pairs(scope)
        others = [pair for pair in pairs if pair[0] != SIGNATURE]
        given = dict(pairs).get(SIGNATURE, "").encode("utf-8", "surrogateescape")
        is_ours = hmac.compare_digest(given, self._signature(scope["path"], others).encode())
        if not is_ours or len(pairs) != len(others) + 1:
            raise AddressError("this address is forged, altered or cut: its signature is not of what it names")
        if self._clock() >= int(dict(others)[EXPIRES]):
            raise ExpiredAddressError("this address has expired; the job's description has another while it is kept")

    def _signature(self, path: str, pairs: list[tuple[str, str]]) -> str:
        signed = json.dumps(["safelight-address", path, sorted(pairs)]).encode()
        return hmac.new(self._key, signed, hashlib.sha256).hexdigest()


def _pairs(scope: Scope) -> list[tuple[str, str]]:
    """Return a query's names and values, as the routes read them."""
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def read_address_key(directory: Path) -> bytes:
    """Return the state directory's secret, which is made where there is none: addresses outlive the server's process.

    Only for whoever holds the directory.

    Raises:
        StateDirectoryError: if it cannot be read or written, is damaged, or was readable by others.

    """
    path = directory / KEY_NAME
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read(path)
        temporary = path.with_name(f".{KEY_NAME}")
        temporary.unlink(missing_ok=True)
        write_private(temporary, secrets.token_bytes(KEY_BYTES))
        temporary.replace(path)
        media.sync(directory)
        return _read(path)
    except OSError as error:
        raise StateDirectoryError(f"state directory: {KEY_NAME} cannot be used: {error.strerror}") from error


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if mode & 0o077 or len(key) != KEY_BYTES:
        problem = "others may read it" if mode & 0o077 else "it is damaged"
        raise StateDirectoryError(
            f"state directory: {KEY_NAME} cannot be used: {problem}; remove it, and addresses given out until now end"
        )
    return key
