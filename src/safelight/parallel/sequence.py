"""Sequence parallelism: each rank has some of the tokens of a forward.

Applied from outside, by hooks: arguments are divided as the model is called, attention layers get a strategy that
reaches the other ranks' tokens, and what the last layer makes is gathered. Lengths that do not divide are padded; the
padding is never attended to, and is cut off at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.attention import Attention
from safelight.errors import InvalidParameterError
from safelight.parallel.attention import SequenceParallelAttention, TokenLayout
from safelight.parallel.mesh import Mesh
from safelight.parallel.plans import SequencePlan, matching, sequence_plan


def apply_sequence_parallel(module: nn.Module, mesh: Mesh) -> None:
    """Divide the tokens of a model over the mesh's ring and Ulysses ranks; with one such rank nothing changes.

    Args:
        module: with a sequence-parallel plan.
        mesh: of this rank.

    Raises:
        InvalidParameterError: if the model has no plan, or its attention cannot be divided.

    """
    if mesh.sequence.size == 1:
        return
    plan, setting = sequence_plan(module), "ulysses_degree" if mesh.ulysses.size > 1 else "ring_degree"
    if plan is None:
        name = type(module).__name__
        raise InvalidParameterError(setting, mesh.sequence.size, f"1: {name} has no sequence-parallel plan")
    strategy = SequenceParallelAttention(mesh.ulysses, mesh.ring, mesh.sequence)
    for pattern in plan.attention:
        for name, layer in matching(module, pattern):
            assert isinstance(layer, Attention), f"{name} is no attention layer"
            if layer.causal:
                raise InvalidParameterError(setting, mesh.sequence.size, f"1: the attention of {name} is causal")
            layer.strategy = strategy
    DividedForward(plan, strategy).install(module)


class DividedForward:
    """The hooks of one model; what they hold is of the forward that runs.

    Args:
        plan: the model's.
        strategy: of its attention layers.

    """

    def __init__(self, plan: SequencePlan, strategy: SequenceParallelAttention) -> None:
        self.plan = plan
        self.strategy = strategy
        self.ranks = strategy.sequence
        self.layout = TokenLayout(0, (), self.ranks.size)

    def install(self, module: nn.Module) -> None:
        """Register the hooks."""
        module.register_forward_pre_hook(self._divide_arguments, with_kwargs=True)
        if self.plan.first_block:
            module.get_submodule(self.plan.first_block).register_forward_pre_hook(self._divide_first)
        module.get_submodule(self.plan.output).register_forward_hook(self._gather)

    def _divide_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Divide the arguments of the model, which is called by names alone."""
        assert not args, "a model whose tokens are divided is called by names"
        plan, rotary = self.plan, kwargs[self.plan.rotary]
        num_replicated = kwargs[plan.replicated].shape[1] if plan.replicated else 0
        divided = [name for name in plan.tokens if kwargs.get(name) is not None]
        lengths = tuple(kwargs[name].shape[1] for name in divided) or (rotary.shape[0] - num_replicated,)
        self.layout = TokenLayout(num_replicated, lengths, self.ranks.size)
        self.strategy.begin(self.layout, rotary.device)
        changed = {name: self._piece(kwargs[name], 1) for name in divided}
        changed[plan.rotary] = self._rotary(rotary)
        for name in plan.groups:
            changed[name] = self._groups(kwargs[name])
        return args, {**kwargs, **changed}

    def _divide_first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Divide the first argument of a block."""
        return (self._piece(args[0], 1), *args[1:])

    def _gather(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the tokens of all ranks, [B, S, C], of the part that the model has a result for: the first."""
        return self.ranks.all_gather(output, dim=1)[:, : self.layout.lengths[0]]

    def _piece(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's piece along `dim`, padded with zeros."""
        return piece_of(whole, dim, self.ranks.rank, self.ranks.size)

    def _rotary(self, table: Tensor) -> Tensor:
        """Return the rows of the replicated tokens, and of this rank's tokens of each part."""
        replicated, *parts = torch.split(table, [self.layout.num_replicated, *self.layout.lengths])
        return torch.cat((replicated, *(self._piece(part, 0) for part in parts)))

    def _groups(self, values: Tensor) -> Tensor:
        """Return [B, G] for the runs of this rank's tokens, as long as they can be; one for all stays one."""
        num_groups = values.shape[1]
        if num_groups == 1:
            return values
        (length,), (piece,) = self.layout.lengths, self.layout.pieces
        run = length // num_groups
        shared = math.gcd(piece, run)  # so many tokens on end always have the same value
        first = torch.arange(self.ranks.rank * piece, (self.ranks.rank + 1) * piece, shared, device=values.device)
        return values[:, (first // run).clamp_max(num_groups - 1)]


def piece_of(whole: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return the rank-th of `size` equal pieces along `dim`; what the last ones lack is zeros."""
    length = whole.shape[dim]
    piece = -(-length // size)
    begin = min(rank * piece, length)
    num_real = min(piece, length - begin)
    real = whole.narrow(dim, begin, num_real)
    return F.pad(real, (0, 0) * (whole.ndim - 1 - dim) + (0, piece - num_real)) if num_real < piece else real
