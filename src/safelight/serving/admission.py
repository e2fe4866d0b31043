"""Whether a request is taken, and as what: every limit on what one client may ask for. Imports no torch.

A request is admitted by what it asks for (its priority, its cost, how many there were this minute) before anything of
it is decoded. It is given a place in a queue by those that its client has, at the moment in which it takes one.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from safelight.core.tenant import NOBODY, Tenant
from safelight.errors import QueueFullError, RateLimitError
from safelight.runtime.client import EngineClient, Ticket
from safelight.serving.cost import check_cost
from safelight.serving.fields import Resolved
from safelight.serving.http.errors import PriorityError
from safelight.serving.http.hosts import address_of
from safelight.serving.limits import Limits
from safelight.serving.principals import Keys, Principal, principal_of

LEAST_PART = 2
"""A client may have one in so many places of a queue, however empty the rest is."""
TIMES_FREE = 4
"""And as many times what is free: each client that comes finds room, though less than those before it."""
NETWORK_BITS = 64
"""Of an IPv6 address: whoever has one has all of its network."""
_MINUTE = 60.0


@dataclass(frozen=True)
class Admission:
    """A request that may be run, as soon as it has a place.

    Attributes:
        owner: who may see what becomes of it; `owner_of` the key.
        client: who shares places with others: an address or, of several keys, the key. The empty one, which is the
            server itself, may have all places.
        priority: higher goes first.
        deadline: seconds after which it is not begun any more; None is no deadline.
        shares: of the places, by client: they are kept, whoever else waits.
        tenant: as whom it has a share of the device's time.

    """

    owner: str = ""
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    tenant: Tenant = NOBODY

    def check_place(self, num_places: int, num_taken: int, clients: Sequence[str]) -> None:
        """Refuse a client that has its share of a queue already.

        Args:
            num_places: of the queue.
            num_taken: of these.
            clients: whose the requests are that wait, as far as that is known.

        Raises:
            QueueFullError: if it has.

        """
        kept = {client: int(share * num_places) for client, share in self.shares.items()}
        counts = {client: clients.count(client) for client in {self.client, *kept}}
        own, mine = counts[self.client], kept.pop(self.client, 0)
        free = num_places - num_taken - sum(max(0, kept[other] - counts[other]) for other in kept)
        rest = num_places - mine - sum(kept.values())
        share = mine + min(rest // LEAST_PART, TIMES_FREE * free)
        if self.client and own >= max(share, mine, 0 if kept else 1):
            waiting = f"{own} of your requests wait already, which is your share of the queue"
            raise QueueFullError(f"{waiting}; try again later")


class AdmissionControl:
    """Admits requests. Only for the event loop's thread.

    Args:
        engine: that says what a unit of cost takes here.
        keys: of the server.
        limits: of every request.
        clock: seconds, of a clock that nobody sets.

    """

    def __init__(
        self, engine: EngineClient, keys: Keys, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._limits, self._clock = engine, limits, clock
        self._shares = {each.owner or "": each.share for each in keys.principals if each.share}
        self._tenants = keys.tenants()
        self._begun: defaultdict[Principal, deque[float]] = defaultdict(deque)
        self._clients: weakref.WeakKeyDictionary[Ticket, str] = weakref.WeakKeyDictionary()

    def admit(self, request: Request, resolved: Resolved, is_job: bool) -> Admission:
        """Answer as what a request may be run, or why not.

        Args:
            request: which the check of the key has let in.
            resolved: what it asks for.
            is_job: whether it waits as long as it must.

        Raises:
            PriorityError: if its key may not have that.
            InvalidParameterError: if it is too much work, or needs more memory than there is.
            RateLimitError: if there were as many in the last minute as may be.

        """
        principal = principal_of(request)
        if resolved.priority > principal.priority:
            raise PriorityError(resolved.priority, principal.priority)
        most = min(self._limits.max_cost, principal.max_cost or math.inf)
        limits = dataclasses.replace(self._limits, max_cost=most)
        seconds = self._engine.stats.cost_seconds
        check_cost(resolved.params, resolved.schema, limits, seconds, principal.max_seconds or math.inf)
        self._check_rate(principal)
        owner = principal.owner or ""
        return Admission(
            owner=owner,
            client=owner if principal.is_one_of_several else client_of(request, owner),
            priority=resolved.priority,
            deadline=None if is_job else self._limits.deadline_seconds,
            shares=self._shares,
            tenant=self._tenants.get(owner, NOBODY),
        )

    def check_place(self, admission: Admission) -> None:
        """Refuse a request that somebody waits for where its client has its share of the engine's queue already.

        Raises:
            QueueFullError: if it has.

        """
        clients = [client for ticket, client in self._clients.items() if ticket.waits]
        admission.check_place(self._limits.waiting, self._engine.stats.num_waiting, clients)

    def wait(self, admission: Admission, ticket: Ticket) -> None:
        """Count a request that was put into the engine's queue, for as long as it waits there."""
        self._clients[ticket] = admission.client

    def _check_rate(self, principal: Principal) -> None:
        """Count a request, unless its key has had as many in the last minute as it may."""
        most = principal.requests_per_minute
        if most is None:
            return
        now, begun = self._clock(), self._begun[principal]
        while begun and begun[0] <= now - _MINUTE:
            begun.popleft()
        if len(begun) >= most:
            raise RateLimitError(f"this key may ask for {most} generations a minute", begun[0] + _MINUTE - now)
        begun.append(now)


def client_of(request: Request, owner: str) -> str:
    """Return who sent a request: the owner of its key, at an address."""
    host = "" if request.client is None else request.client.host
    address = address_of(host.partition("%")[0])
    if address is None:
        return f"{owner} {host}"
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.ip_network((address, NETWORK_BITS), strict=False).network_address
    return f"{owner} {address}"
