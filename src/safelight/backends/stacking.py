"""Calls of several requests as one, where it was proven: nobody says which of their arguments have a batch dimension.

When two calls of one network with equal trees of arguments meet for the first time, they are made apart and as one, and
compared; they are stacked from then on only if every row is the same within rounding.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from safelight.backends.refusals import one_line
from safelight.backends.trees import LOWER, RandomStates, put_together, static, taken_apart
from safelight.core.device import is_lost
from safelight.core.form import EAGER
from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""By which a row in float32 may differ, of the largest value of its tensor, or of 1."""
LOWER_FACTOR = 2.0
"""How much further from float32 a row of lower precision may lie than what it is when it is made alone."""
MAX_RECORDS = 1024
TRIAL = "trial"
"""Static argument of a call that nobody waits for: `stacked`, or `float32`, in which it is computed to compare with."""

Role = Literal["rows", "scalar", "shared"]
"""Of a tensor in a stacked call: rows behind each other; a number a call, repeated for its rows; the same for all."""


@dataclass(frozen=True)
class Proof:
    """A trial that showed no difference.

    Attributes:
        differed: places, among the tensors of the arguments, of those that had other values; the rest were equal.
        roles: of each tensor.

    """

    differed: frozenset[int]
    roles: tuple[Role, ...]


@dataclass(eq=False)
class Record:
    """What is known of stacking calls of one network with equal trees.

    Attributes:
        apart: whether they are made apart for good, because a trial failed, or they cannot be tried.
        proofs: of trials, the last first.

    """

    apart: bool = False
    proofs: list[Proof] = field(default_factory=list)


class Records:
    """The records of one model: they belong to it, and hold nothing of a request. The oldest used go first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Record] = OrderedDict()

    def of(self, key: Hashable, apart: bool) -> Record:
        """Return the record of a key, new where there is none."""
        record = self._kept.setdefault(key, Record(apart))
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_RECORDS:
            self._kept.popitem(last=False)
        return record


class TreeSignature:
    """In place of a declared signature: what calls must have in common to be tried as one.

    That is the network, the method, and the trees of their arguments: static values, shapes and dtypes. It is found out
    when it is first asked for, so that a driver that stacks nothing pays nothing.

    Args:
        network: names it; calls of another one differ.
        arguments: of the call.
        records: of the model.

    """

    def __init__(self, network: Hashable, arguments: Mapping[str, Any], records: Records) -> None:
        self._network, self._arguments, self._records = network, arguments, records

    @functools.cached_property
    def record(self) -> Record:
        """What is known of such calls."""
        leaves, form = taken_apart(self._arguments)
        parts = [_tensor(leaf) if isinstance(leaf, Tensor) else static(leaf) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        unknown = None in parts or not any(tensor.ndim for tensor in tensors)
        return self._records.of((self._network, form, *parts), unknown)

    def __eq__(self, other: object) -> bool:
        """Say whether the two calls may be made as one, or tried so."""
        if self is other:
            return True
        return isinstance(other, TreeSignature) and self.record is other.record and not self.record.apart

    def __hash__(self) -> int:
        """Return a number that is the same for all calls of one record."""
        return id(self.record)


def _tensor(tensor: Tensor) -> Hashable:
    return (tensor.shape, tensor.dtype, tensor.device)


class ProvenStacking:
    """A wrapper that makes calls of one tree signature as one forward, once a trial has proven it, and apart before.

    Args:
        device: on which they are made.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards; those that are proven together."""
        groups: defaultdict[Hashable, list[int]] = defaultdict(list)
        for place, forward in enumerate(forwards):
            key = forward.call.stack_key
            groups[place if key is None else (key, forward.form)].append(place)
        results: dict[int, Tree] = {}
        for places in groups.values():
            results.update(zip(places, self._made([forwards[place] for place in places], make), strict=True))
        return [results[place] for place in range(len(forwards))]

    def _made(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        record = _record(forwards[0])
        alone = [replace(each, call=replace(each.call, signature=None)) for each in forwards]
        if record is None or record.apart or len(forwards) == 1:
            return make(alone)
        columns = list(zip(*map(_tensors, alone), strict=True))
        for proof in record.proofs:
            if all(place in proof.differed or _equal(column) for place, column in enumerate(columns)):
                (made,) = make([_stacked(alone, proof.roles)])
                return split(made, len(forwards))
        return self._try(record, alone, columns, make)

    def _try(
        self, record: Record, alone: Sequence[Forward], columns: Sequence[Sequence[Tensor]], make: Make
    ) -> list[Tree]:
        """Make calls apart and as one; return what they are apart, and remember what the comparison showed."""
        differed = frozenset(place for place, column in enumerate(columns) if not _equal(column))
        states = RandomStates()
        made = make(alone)
        if states.have_moved():
            self._fail(record, alone, "it draws random numbers")
        elif differed:
            reasons = []
            for roles in possible_roles(columns, differed):
                reason = self._difference(alone, made, roles, make)
                if reason is None:
                    record.proofs.insert(0, Proof(differed, roles))
                    return made
                reasons.append(reason)
            self._fail(record, alone, "; ".join(reasons) or "its arguments have no rows in common")
        return made

    def _difference(
        self, alone: Sequence[Forward], made: Sequence[Tree], roles: tuple[Role, ...], make: Make
    ) -> str | None:
        """Say how calls as one differ from calls apart; None if they are the same within rounding."""
        try:
            (together,) = make([_on_trial(_stacked(alone, roles), "stacked")])
            return self._compare(alone, made, split(together, len(alone)), make)
        except Exception as error:  # a trial's boundary: a network that cannot do it is made apart
            if is_lost(self._device, error):
                raise
            return f"stacked or in float32, it fails: {one_line(str(error))}"

    def _compare(self, alone: Sequence[Forward], made: Sequence[Tree], parts: Sequence[Tree], make: Make) -> str | None:
        for forward, own, part in zip(alone, made, parts, strict=True):
            exact: Callable[[], Tree] = functools.partial(_in_float32, forward, make)
            reason = difference(own, part, exact)
            if reason is not None:
                return reason
        return None

    def _fail(self, record: Record, forwards: Sequence[Forward], reason: str) -> None:
        record.apart = True
        call = forwards[0].call
        logger.info("calls of %s.%s are made apart: %s", call.component, call.method, reason)


def possible_roles(columns: Sequence[Sequence[Tensor]], differed: frozenset[int]) -> list[tuple[Role, ...]]:
    """Return what the tensors of stacked calls may be, in the order in which it is tried.

    The first tensor with dimensions is a picture's or a video's, and has the rows of the call. One that has as many has
    a row for each, unless it is a list of numbers or a table that happens to have this size, and equal values in all.

    Args:
        columns: for each tensor of the arguments, it in each call.
        differed: places of those that have other values.

    """
    firsts = [column[0] for column in columns]
    num_rows = next(first.shape[0] for first in firsts if first.ndim)
    found: list[tuple[Role, ...]] = []
    for least_dims in (1, 2, math.inf):
        roles: list[Role] = []
        for place, first in enumerate(firsts):
            has_rows = bool(first.ndim and num_rows and first.shape[0] % num_rows == 0)
            if place in differed:
                roles += ["rows"] if has_rows else ["scalar"] if not first.ndim else []
            else:
                is_own = has_rows and first.shape[0] == num_rows and first.ndim >= least_dims
                roles.append("rows" if is_own else "shared")
        if len(roles) == len(firsts) and tuple(roles) not in found:
            found.append(tuple(roles))
    return found


def _stacked(forwards: Sequence[Forward], roles: Sequence[Role]) -> Forward:
    """Return one forward with the rows of all."""
    first = forwards[0]
    leaves, form = taken_apart(dict(first.call.kwargs))
    columns = list(zip(*map(_tensors, forwards), strict=True))
    num_rows = next(column[0].shape[0] for column in columns if column[0].ndim)
    joined = iter([_joined(column, role, num_rows) for column, role in zip(columns, roles, strict=True)])
    kwargs = put_together([next(joined) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
    reqs = tuple(req for forward in forwards for req in forward.reqs)
    return Forward(replace(first.call, kwargs=kwargs), reqs, first.form)


def _joined(column: Sequence[Tensor], role: Role, num_rows: int) -> Tensor:
    if role == "shared":
        return column[0]
    return torch.cat([each.expand(num_rows) for each in column] if role == "scalar" else list(column))


def split(result: Tree, num_calls: int) -> list[Tree]:
    """Return each call's part of a result; copies, so that no request keeps another's alive.

    Raises:
        ValueError: if a tensor of it cannot be divided.

    """
    leaves, form = taken_apart(result)
    pieces = [_pieces(leaf, num_calls) for leaf in leaves]
    return [put_together([piece[number] for piece in pieces], form) for number in range(num_calls)]


def _pieces(leaf: Any, num_calls: int) -> Sequence[Any]:
    if not isinstance(leaf, Tensor):
        return [leaf] * num_calls
    if not leaf.ndim or leaf.shape[0] % num_calls:
        raise ValueError(f"its result of shape {tuple(leaf.shape)} is not one of {num_calls} calls")
    return [piece.clone() for piece in leaf.chunk(num_calls)]


def difference(alone: Tree, part: Tree, exact: Callable[[], Tree]) -> str | None:
    """Say how a call's part of a stacked result differs from its own; None if it is the same within rounding.

    Args:
        alone: its own result.
        part: of the stacked one.
        exact: makes its result in float32, which is asked for where it is of lower precision.

    """
    (mine, form), (theirs, other) = taken_apart(alone), taken_apart(part)
    if form != other or [_kind(leaf) for leaf in mine] != [_kind(leaf) for leaf in theirs]:
        return "stacked, its result has another form"
    is_lower = any(isinstance(leaf, Tensor) and leaf.dtype in LOWER for leaf in mine)
    references = taken_apart(exact())[0] if is_lower else mine
    for own, other, reference in zip(mine, theirs, references, strict=True):
        if not isinstance(own, Tensor):
            continue
        if own.dtype in LOWER:
            allowed = LOWER_FACTOR * _distance(own, reference)
            error = _distance(other, reference)
        else:
            allowed = TOLERANCE * max(1.0, float(own.abs().max())) if own.is_floating_point() else 0.0
            error = _distance(other, own)
        if not error <= allowed:
            return f"stacked, it is off by {error:.1e}, where {allowed:.1e} is rounding"
    return None


def _kind(leaf: Any) -> Hashable:
    return _tensor(leaf) if isinstance(leaf, Tensor) else (static(leaf) or id(leaf))


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def _in_float32(forward: Forward, make: Make) -> Tree:
    return make([replace(_on_trial(forward, "float32"), form=EAGER)])[0]


def _on_trial(forward: Forward, kind: str) -> Forward:
    return replace(forward, call=replace(forward.call, static={**forward.call.static, TRIAL: kind}))


def _record(forward: Forward) -> Record | None:
    signature = forward.call.signature
    return signature[0].record if signature and isinstance(signature[0], TreeSignature) else None


def _tensors(forward: Forward) -> list[Tensor]:
    return [leaf for leaf in taken_apart(dict(forward.call.kwargs))[0] if isinstance(leaf, Tensor)]


def _equal(column: Sequence[Tensor]) -> bool:
    return all(each is column[0] or torch.equal(each, column[0]) for each in column[1:])
