"""What is set once for a server, beside the engine's own settings: HTTP, queue and storage. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from safelight.core.options import check_settings, option
from safelight.errors import InvalidParameterError, StateDirectoryError, UsageError
from safelight.serving.http.hosts import host_name, is_loopback
from safelight.serving.principals import Keys, read_keys

RESPONSE_FORMATS = ("b64_json", "url")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*)(:[0-9]{1,5})?")
_USUAL_PORTS = {("http", ":80"), ("https", ":443")}
"""Which browsers leave out of an origin."""
DEFAULT_STATE_DIR = Path("~/.local/state/safelight")


@dataclass(frozen=True)
class HTTPArgs:
    """What HTTP, queue and storage need. Times are in seconds, sizes in bytes.

    Attributes:
        host, port: where to listen; a host that others reach needs a key.
        state_dir: of jobs and outputs; one server at a time uses it.
        api_key_file: a file of the keys of which every request must bring one (`serving/principals.py`).
        served_model_name: what the model is asked for by; its own name unless given. Several are separated by commas.
        public_url: where clients reach the server, if that is not what their `Host` header says.
        allowed_origins: of web pages that may use the server, as browsers write them, separated by commas; `*` is all.
        allowed_hosts: names that a server without a key answers to, beside this machine's own (localhost, 127.0.0.1,
            ::1) and that of `public_url`, separated by commas, without ports. A server with a key answers to any.
        response_format: how pictures are returned where a request does not say it.
        replicas: of the model, each on devices of its own.
        max_running: outputs that hold device memory at most, of each replica.
        max_waiting: requests that may wait.
        max_cost: steps x tokens x branches x outputs that one request may ask for; where there are so many tokens that
            attention takes as much as all else, each counts twice, and so on.
        max_tokens: latent tokens of one step, which cannot be interrupted.
        batching: `exact`, or `throughput`, which stacks model calls of equal signature.
        share: of device time that the longest request, and the oldest, get, whatever has priority over them.
        warm_up: whether one small request is run before the server is ready.
        keep_hours: how long finished jobs and their outputs are kept.
        max_storage: of all outputs together; the oldest go first. None is no limit.
        drain_seconds: that running requests have when the server is told to stop.
        unit_limit: after which a unit of work counts as hung, if twenty of its medians are not longer.
        first_unit_limit: the same for loading, and for the first unit of a kind.
        heartbeat_limit: of silence, after which a worker counts as stopped.

    """

    host: str = option("text", "Where to listen.", "127.0.0.1")
    port: int = option("count", "Port to listen on.", 8000, minimum=1, maximum=65535)
    state_dir: str | None = option("text", f"Folder of jobs and outputs.  [default: {DEFAULT_STATE_DIR}]")
    api_key_file: str | None = option("text", "File with the key that every request must bring, or YAML with several.")
    served_model_name: str | None = option("text", "Name of the model for clients; aliases after commas.")
    public_url: str | None = option("text", "Where clients reach the server.  [default: their Host header]")
    allowed_origins: str | None = option("text", "Origins of web pages that may use it, after commas; or *.")
    allowed_hosts: str | None = option("text", "Names it answers to without a key, beside localhost; after commas.")
    response_format: str = option(
        "choice",
        f"How pictures are returned unless asked otherwise: {', '.join(RESPONSE_FORMATS)}.",
        choices=RESPONSE_FORMATS,
    )
    replicas: int = option("count", "Replicas of the model, each on devices of its own.", 1, minimum=1, maximum=64)
    max_running: int = option("count", "Outputs that hold device memory at most.", 4, minimum=1, maximum=1024)
    max_waiting: int = option("count", "Requests that may wait.", 64, minimum=1, maximum=100_000)
    max_cost: float = option("amount", "Steps x tokens x branches x outputs of a request at most.", 60e6, minimum=1)
    max_tokens: int = option("count", "Latent tokens of one step at most.", 131_072, minimum=1)
    batching: str = option(
        "choice", "exact, or throughput: stack the model calls of several requests.", choices=("exact", "throughput")
    )
    share: float = option(
        "amount", "Share of device time that the longest request and the oldest always get.", 0.1, minimum=0, maximum=1
    )
    warm_up: bool = option("boolean", "Run one small request before the server is ready.", True)
    keep_hours: float = option("amount", "Hours for which finished jobs are kept.", 24.0, minimum=0, maximum=1_000_000)
    max_storage: int | None = option("count", "Bytes of all outputs together.  [default: no limit]", minimum=1)
    drain_seconds: float = option(
        "amount", "Seconds that running requests have when the server stops.", 30.0, minimum=0
    )
    unit_limit: float = option("amount", "Seconds after which a unit of work counts as hung.", 60.0, minimum=0.1)
    first_unit_limit: float = option(
        "amount", "The same for loading and the first unit of a kind.", 1800.0, minimum=0.1
    )
    heartbeat_limit: float = option(
        "amount", "Seconds of silence after which a worker counts as stopped.", 10.0, minimum=0.5
    )

    def __post_init__(self) -> None:
        """Refuse what a field does not take, by its name."""
        check_settings(self)
        if self.public_url is not None and not is_base_url(self.public_url):
            takes = "http:// or https:// and a host, perhaps a port and a path, such as https://pictures.example.org"
            raise InvalidParameterError("public_url", self.public_url, takes)
        if self.host.startswith("["):
            raise InvalidParameterError("host", self.host, "an address without brackets, such as ::1")
        self.origins()
        self.hosts()

    def origins(self) -> tuple[str, ...]:
        """Return the origins whose pages may use the server.

        Raises:
            InvalidParameterError: for what no browser would write.

        """
        names = tuple(name.strip() for name in (self.allowed_origins or "").split(",") if name.strip())
        for name in names:
            match = _ORIGIN.fullmatch(name)
            if name != "*" and (match is None or (match[1], match[4]) in _USUAL_PORTS):
                example = "https://app.example.com or http://localhost:3000, without a path or a usual port"
                raise InvalidParameterError("allowed_origins", name, f"origins as browsers write them: {example}; or *")
        return names

    def hosts(self) -> tuple[str, ...]:
        """Return the names, beside this machine's own, that a server without a key answers to.

        Raises:
            InvalidParameterError: for what is no name of a host.

        """
        given = [name.strip() for name in (self.allowed_hosts or "").split(",") if name.strip()]
        names = [host_name(f"[{name}]" if name.count(":") > 1 else name) for name in given]
        for name, found in zip(given, names, strict=True):
            if found is None or name.count(":") == 1:
                takes = "names of hosts without ports, such as pictures.example.org; a server with a key takes any"
                raise InvalidParameterError("allowed_hosts", name, takes)
        public = urlsplit(self.public_url).hostname if self.public_url else None
        return tuple(name for name in (*names, public) if name)

    def state_path(self) -> Path:
        """Return the state directory.

        Raises:
            StateDirectoryError: if it lies in a home directory, and this user has none.

        """
        path = Path(self.state_dir or DEFAULT_STATE_DIR)
        try:
            return path.expanduser()
        except RuntimeError as error:
            reason = f"{str(path)!r}: there is no such home directory; name a folder elsewhere"
            raise StateDirectoryError(f"state_dir: {reason} (--state-dir, SAFELIGHT_STATE_DIR)") from error

    def keys(self) -> Keys:
        """Return the keys of which every request must bring one; none where it needs none.

        Raises:
            UsageError: if the file has none or a wrong one, or if others could reach a server without one.

        """
        if self.api_key_file is None:
            if not is_loopback(self.host):
                raise UsageError(f"host: {self.host} is reachable by others; it needs --api-key-file")
            return Keys()
        return read_keys(self.api_key_file, self.max_cost)


def is_base_url(url: str) -> bool:
    """Say whether an address is one before which nothing is missing, and to which a path can be added."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an address in brackets
        return False
    plain = url.isascii() and url.isprintable() and not set(url) & set(' ?#\\<>"')
    return known and plain and parts.username is None and parts.password is None
