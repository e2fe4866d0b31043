"""Model calls that the ranks of a group make together: whichever component, each rank is given the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
import torch
from torch import Tensor

from safelight.core.model_runner import Forward, Make
from safelight.core.trees import Tree, leaves, with_leaves
from safelight.errors import RankFailedError
from safelight.parallel.collectives import Communicator, DesynchronisedError

Call = TypeVar("Call")
Sharing = Literal["together", "first rank"]
"""How ranks share the calls of a component: all make each call, and wait for each other in it; or the first rank alone
has the component, and the others are sent what it makes. Of steps, guidance branches are made on different ranks."""


class CallsOverRanks:
    """A wrapper of forwards: every rank has every result, whoever made it.

    Args:
        sharing: by component, for what is not a step's; those that are not there each rank runs by itself.
        branches: the ranks among which guidance branches are divided.
        world: all ranks.
        device: where results go.

    """

    def __init__(
        self, sharing: Mapping[str, Sharing], branches: Communicator, world: Communicator, device: torch.device
    ) -> None:
        self.sharing = sharing
        self._branches = branches
        self._world = world
        self._device = device

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards of components that are shared alike.

        Raises:
            RankFailedError: on all ranks, if the first rank failed alone; on its own, from what it raised.
            DesynchronisedError: if a forward failed in which others wait.

        """
        call = forwards[0].call
        is_step, shared = call.signature is not None, self.sharing.get(call.component)
        if not is_step and shared is None:
            return make(forwards)
        if not is_step and shared == "first rank":
            return [self._on_first_rank(forward, make) for forward in forwards]
        # Ranks join results of one shape.
        divided = is_step and len({forward.call.num_rows for forward in forwards}) == 1
        try:
            return divide(forwards, make, self._branches) if divided else make(forwards)
        except Exception as error:
            raise DesynchronisedError("a forward that several ranks share failed on one") from error

    def _on_first_rank(self, forward: Forward, make: Make) -> Tree:
        """Make a call on the first rank; if it fails, the others are told in the place of a result."""
        if self._world.rank > 0:
            return self._received()
        try:
            (made,) = make([forward])
        except Exception as error:  # the others wait for a result, or to hear that there is none
            self._tell({"error": repr(error)})
            raise RankFailedError("this rank's component failed") from error
        tensors = list(leaves(made))
        self._tell({"made": with_leaves(made, map(Place, range(len(tensors))))})
        self._world.broadcast_tensors(tensors, self._device)
        return made

    def _tell(self, told: dict[str, Any]) -> None:
        self._world.broadcast_bytes(msgspec.msgpack.encode(told), device=self._device)

    def _received(self) -> Tree:
        told = msgspec.msgpack.decode(self._world.broadcast_bytes(None, device=self._device))
        if "error" in told:
            raise RankFailedError(f"the first rank failed: {told['error']}")
        return filled(told["made"], self._world.broadcast_tensors(None, self._device))


class Place(msgspec.Struct, tag="tensor"):
    """Stands for a tensor in a message."""

    number: int


def filled(tree: Any, tensors: Sequence[Tensor]) -> Tree:
    """Return a tree as it was sent, with the tensors in their places; tuples have become lists."""
    if isinstance(tree, list):
        return [filled(entry, tensors) for entry in tree]
    if isinstance(tree, dict):
        if tree.get("type") == "tensor":
            return tensors[tree["number"]]
        return {key: filled(entry, tensors) for key, entry in tree.items()}
    return tree


def divide(calls: Sequence[Call], make: Callable[[Sequence[Call]], list[Tree]], ranks: Communicator) -> list[Tree]:
    """Make the calls of a step, divided over ranks; return all results on every rank.

    In each round a rank makes one call, and one collective joins the round's results. Where a round has fewer calls
    than there are ranks, some make the same call; one that all make needs no collective.

    Args:
        calls: the branches of a step, the same on every rank. Their results have one shape: that of the latents.
        make: makes them.
        ranks: along the axis `cfg`.

    """
    results: list[Tree] = []
    for begin in range(0, len(calls), ranks.size):
        in_turn = calls[begin : begin + ranks.size]
        (own,) = make([in_turn[ranks.rank % len(in_turn)]])
        results += [own] if len(in_turn) == 1 else _joined(own, ranks)[: len(in_turn)]
    return results


def _joined(own: Tree, ranks: Communicator) -> list[Tree]:
    """Return the results of every rank; the tensors of one go in one piece."""
    parts = list(leaves(own))
    if len(parts) == 1:
        return [with_leaves(own, [each]) for each in ranks.all_gather_list(parts[0])]
    sizes = [tensor.numel() for tensor in parts]
    assert len({tensor.dtype for tensor in parts}) == 1, "the tensors of a result have one dtype"
    joined = []
    for flat in ranks.all_gather_list(torch.cat([tensor.flatten() for tensor in parts])):
        pieces = zip(torch.split(flat, sizes), parts, strict=True)
        joined.append(with_leaves(own, [piece.view(like.shape) for piece, like in pieces]))
    return joined
