"""A share of a queue for each client, so that none fills it. Imports no torch."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.requests import Request

from safelight.errors import QueueFullError

LEAST_PART = 2
"""A client may have one in so many places of a queue, however empty the rest is."""
TIMES_FREE = 4
"""And as many times what is free: each client that comes finds room, though less than those before it."""
NETWORK_BITS = 64
"""Of an IPv6 address: whoever has one has all of its network."""


def client_of(request: Request, owner: str) -> str:
    """Return who sent a request: the owner of its key, at an address."""
    host = "" if request.client is None else request.client.host
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return f"{owner} {host}"
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.ip_network((address, NETWORK_BITS), strict=False).network_address
    return f"{owner} {address}"


def check_share(client: str, waiting: Iterable[str], num_places: int, num_taken: int) -> None:
    """Refuse a client that has its share of a queue already.

    Args:
        client: `client_of` the request; the empty one, which is the server itself, may have all places.
        waiting: whose the requests are that wait.
        num_places: of the queue.
        num_taken: of these.

    Raises:
        QueueFullError: if it has.

    """
    own = sum(other == client for other in waiting)
    share = min(num_places // LEAST_PART, TIMES_FREE * (num_places - num_taken))
    if client and own >= max(1, share):
        raise QueueFullError(f"{own} of your requests wait already, which is your share of the queue; try again later")
