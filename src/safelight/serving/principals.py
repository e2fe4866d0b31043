"""Who may send requests: the keys of a server, and what the bearer of each may ask for. Imports no torch."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from starlette.requests import Request

from safelight.core.options import Option
from safelight.core.tenant import Tenant
from safelight.errors import InvalidParameterError, UnknownParameterError

MIN_KEY_LENGTH = 16
LEAST_PRIORITY, MOST_PRIORITY = -10, 10
_SINGLE_LINE = f"a file whose first line is a key of {MIN_KEY_LENGTH} or more printable ASCII characters"
_SEVERAL = re.compile(r"(?:[ \t]*(?:#.*|---)?\n)*keys:(?:\s|$)")
"""How a file of several keys begins, perhaps after comments; no single key is so short, or has a space in it."""


@dataclass(frozen=True)
class Principal:
    """Who sends a request, and what they may ask for.

    Attributes:
        name: for the operator; empty where there are no names.
        owner: `owner_of` the key, which jobs keep; empty where there are no keys, None for who has a signed address.
        priority: the highest that a request may have.
        max_cost, max_seconds: of one request, beside what the server sets; None is no further bound.
        requests_per_minute: that may be generated; None is any number.
        share: of device time, and of the places in which requests wait, that is kept for this one, from 0 to 1; None
            keeps no places, and as much time as for each other key without a share.
        is_one_of_several: whether there are others, so that places are shared by keys, and not by addresses.

    """

    name: str = ""
    owner: str | None = ""
    priority: int = MOST_PRIORITY
    max_cost: float | None = None
    max_seconds: float | None = None
    requests_per_minute: int | None = None
    share: float | None = None
    is_one_of_several: bool = False


ANYONE = Principal()
"""Everybody, where there are no keys."""
BY_ADDRESS = Principal(owner=None)
"""Whoever has a signed address, which opens one file."""


class Keys:
    """The keys of a server, each as a hash, and whose they are.

    Args:
        principals: by key; none lets everyone in.

    """

    def __init__(self, principals: Mapping[str, Principal] | None = None) -> None:
        self._digests = [(_digest(key), principal) for key, principal in (principals or {}).items()]

    def __bool__(self) -> bool:
        """Say whether a key is asked for."""
        return bool(self._digests)

    @property
    def principals(self) -> Sequence[Principal]:
        """Whose they are."""
        return [principal for _, principal in self._digests]

    def tenants(self) -> Mapping[str, Tenant]:
        """Return as whom requests share the device's time, by owner; nothing where there are not several keys.

        What the shares leave belongs to the keys without one, in equal parts.
        """
        several = [each for each in self.principals if each.is_one_of_several]
        rest = max(0.0, 1 - sum(each.share or 0.0 for each in several))
        part = rest / max(1, sum(each.share is None for each in several))
        owners = {each.owner or "": part if each.share is None else each.share for each in several}
        return {owner: Tenant(owner, share) for owner, share in owners.items()}

    def principal(self, key: str) -> Principal | None:
        """Return whose key it is; None where it is nobody's. This takes the same time whichever it is."""
        given, found = _digest(key), None
        for digest, principal in self._digests:
            if hmac.compare_digest(given, digest):
                found = principal
        return found


def principal_of(request: Request) -> Principal:
    """Return who sent a request, as the check of the key found."""
    principal: Principal = request.scope["state"]["principal"]
    return principal


def owner_of(api_key: str | None) -> str:
    """Return what a job keeps of the key it was sent with: a hash, or nothing where there is no key."""
    return hashlib.sha256(b"safelight-owner\0" + api_key.encode()).hexdigest()[:32] if api_key else ""


def one_key(key: str | None) -> Keys:
    """Return the keys of a server with one key, whose bearer may ask for all that the server does; or with none."""
    return Keys({key: Principal(owner=owner_of(key))} if key else None)


def _digest(text: str) -> bytes:
    """Hash what is compared, so that its comparison takes the same time whatever the lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


# Files of keys

_FIELDS: Mapping[str, Option] = {
    "name": Option("string", "of whose key it is"),
    "key": Option("string", "the key"),
    "priority": Option("integer", "the highest of a request", minimum=LEAST_PRIORITY, maximum=MOST_PRIORITY),
    "max_cost": Option("number", "of one request", minimum=1),
    "max_seconds": Option("number", "predicted of one request", minimum=0.001),
    "requests_per_minute": Option("integer", "generations", minimum=1),
    "share": Option("number", "of device time, and of the places in which requests wait", minimum=0, maximum=1),
}


def read_keys(path: str, max_cost: float) -> Keys:
    """Return the keys in a file: of one line, which is the key; or YAML, with what each key's bearer may ask for.

    Args:
        path: of the file.
        max_cost: what the server does of one request, which no key may exceed.

    Raises:
        InvalidParameterError: naming the file, and the entry and the field that are wrong. It never holds a key.

    """
    text = _read(path)
    return _several(path, text, max_cost) if _SEVERAL.match(text) else one_key(_single(path, text))


def read_key(path: str) -> str:
    """Return the key in a file's first line.

    Raises:
        InvalidParameterError: if there is none.

    """
    return _single(path, _read(path))


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: ~ where there is no home directory
        raise InvalidParameterError("api_key_file", path, "a file that can be read") from error


def _single(path: str, text: str) -> str:
    key = text.strip().partition("\n")[0].strip()
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise InvalidParameterError("api_key_file", path, _SINGLE_LINE)
    return key


def _several(path: str, text: str, max_cost: float) -> Keys:
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # its message would quote the file, keys and all
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise _wrong(path, f"is no YAML{f' at line {mark.line + 1}' if mark else ''}") from None
    entries = loaded.get("keys") if isinstance(loaded, dict) else None
    if not isinstance(entries, list) or not entries or set(loaded) != {"keys"}:
        raise _wrong(path, "it takes `keys`, a list of entries, and nothing else")
    found: dict[str, Principal] = {}
    for number, entry in enumerate(entries, 1):
        key, principal = _entry(path, f"entry {number}", entry, max_cost)
        if key in found:
            raise _wrong(path, f"entry {number}: key: is {found[key].name!r}'s already")
        if principal.name in (other.name for other in found.values()):
            raise _wrong(path, f"entry {number}: name: got {principal.name!r}; it takes a name of its own")
        found[key] = principal
    total = sum(principal.share or 0.0 for principal in found.values())
    if total > 1 + 1e-9:
        raise _wrong(path, f"share: got {total:g} of all entries together; it takes at most 1")
    return Keys(found)


def _entry(path: str, where: str, entry: Any, max_cost: float) -> tuple[str, Principal]:
    """Return one entry's key, and whose it is."""
    if not isinstance(entry, dict):
        raise _wrong(path, f"{where}: got no mapping; it takes {', '.join(_FIELDS)}")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        try:
            if name not in _FIELDS:
                raise UnknownParameterError(str(name), _FIELDS)
            if name == "key":
                values[name] = _checked_key(value)
            elif value is not None:
                values[name] = _FIELDS[name].check(name, value)
        except (InvalidParameterError, UnknownParameterError) as error:
            raise _wrong(path, f"{where}: {error}") from None
    for name in ("name", "key"):
        if not values.get(name, "").strip():
            raise _wrong(path, f"{where}: {name}: got nothing; it takes {_FIELDS[name].help}")
    if values.get("max_cost", 0) > max_cost:
        takes = f"at most {max_cost:,.0f}, which the server does (max_cost)"
        raise _wrong(path, f"{where}: max_cost: got {values['max_cost']:,.0f}; it takes {takes}")
    key = values.pop("key")
    return key, Principal(owner=owner_of(key), is_one_of_several=True, **{"priority": 0, **values})


def _checked_key(key: Any) -> str:
    """Return a key of an entry; what is said of another does not show it."""
    if not isinstance(key, str) or len(key) < MIN_KEY_LENGTH or not re.fullmatch(r"[!-~]+", key):
        got = f"{len(key)} characters" if isinstance(key, str) else f"a value of the kind {type(key).__name__}"
        takes = f"a text of {MIN_KEY_LENGTH} or more printable ASCII characters without spaces"
        raise InvalidParameterError.rebuilt(f"key: got {got}; it takes {takes}", "api_key_file")
    return key


def _wrong(path: str, problem: str) -> InvalidParameterError:
    return InvalidParameterError.rebuilt(f"api_key_file: {path!r}: {problem}", "api_key_file")
