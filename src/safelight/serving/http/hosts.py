"""Under which names the server may be asked for: what a browser was made to take for ours by a foreign name server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from starlette.datastructures import Headers

from safelight.serving.http.errors import MalformedRequestError

_LONGEST = 255
"""Characters of a host's name (RFC 1035), which are looked at."""
_ONCE = ("content-type", "origin", "sec-fetch-site")
"""Headers by which a request is let in, of which nobody could say which one counts; of others the protocol says it."""
_NOT_IN_NAMES = frozenset(' */\\?#@<>"%,;^`{|}')


@dataclass(frozen=True)
class Hosts:
    """The names that a server without a key answers to: those of this machine alone, and the ones it was told.

    A page whose own name resolves to 127.0.0.1 is of the same origin as the server then (DNS rebinding), and has no
    other mark than its name.

    Attributes:
        allowed: further names, in lower case, without ports.

    """

    allowed: tuple[str, ...] = ()

    def is_foreign(self, headers: Headers) -> bool:
        """Say whether a request is for another name; one without a name, of HTTP/1.0, is of no browser."""
        host = headers.get("host", "")
        name = host_name(host)
        return host != "" and (name is None or not (is_loopback(name) or name in self.allowed))


def host_name(host: str) -> str | None:
    """Return the name in a `Host`, in lower case; None for what has not the form `name`, `name:port` or `[IPv6]:port`.

    It never parses an address: what parses them raises for some.
    """
    if not 1 <= len(host) <= _LONGEST + len(":65535"):
        return None
    if host.startswith("["):
        name, closed, port = host[1:].partition("]")
        is_name = closed != "" and isinstance(address_of(name), ipaddress.IPv6Address) and port[:1] in ("", ":")
        port = port[1:]
    else:
        name, _, port = host.partition(":")
        is_name = name != "" and name.isprintable() and not _NOT_IN_NAMES.intersection(name) and "]" not in name
    is_port = port == "" or (port.isascii() and port.isdigit() and len(port) <= len("65535"))
    return name.lower().removesuffix(".") if is_name and is_port else None


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a name is; None for another name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    """Say whether only this machine is reached by a name, whatever a name server says (RFC 6761)."""
    address = address_of(name)
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def check_headers(headers: Headers) -> None:
    """Refuse a `Host` or an `Origin` that is none (RFC 9112, 3.2; RFC 6454, 7), and a second one.

    Raises:
        MalformedRequestError: naming the header.

    """
    for name in _ONCE:
        if len(headers.getlist(name)) > 1:
            raise MalformedRequestError(f"{name}: it is taken once")
    host, origin = headers.get("host", ""), headers.get("origin", "null")
    if host != "" and host_name(host) is None:
        raise MalformedRequestError("host: it takes the name of a host, and perhaps a port")
    scheme, separator, place = origin.partition("://")
    is_scheme = scheme[:1].isalpha() and scheme.isascii() and len(scheme) <= _LONGEST
    is_scheme = is_scheme and all(letter.isalnum() or letter in "+-." for letter in scheme)
    if origin != "null" and not (is_scheme and separator and (place == "" or host_name(place) is not None)):
        raise MalformedRequestError("origin: it takes null, or a scheme, a host and perhaps a port")
