"""How the devices of one request are laid out, and the choice of it. Importing this imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safelight.errors import InvalidParameterError

AXES = ("cfg", "ring", "ulysses", "tp")
"""Axes of the mesh, from the slowest link to the fastest: ranks that differ in the last alone are neighbours."""

MEMORY_SHARE = 0.8
"""Of a device's memory, what the transformer's weights may take; the rest is for activations and other components."""


@dataclass(frozen=True)
class ModelFacts:
    """What a layout is checked against.

    Attributes:
        name: of the model, for messages.
        num_heads: attention heads of the transformer.
        num_branches: guidance branches that a step can have at most.
        tensor_plan: whether the transformer states a tensor-parallel plan.
        sequence_plan: whether it states a sequence-parallel plan.
        row_parallel_vae: whether the VAE can be decoded in bands.
        parameter_bytes: of the transformer's weights.

    """

    name: str
    num_heads: int
    num_branches: int
    tensor_plan: bool
    sequence_plan: bool
    row_parallel_vae: bool
    parameter_bytes: int = 0


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the axes; their product is the number of devices.

    Attributes:
        cfg: groups that share the guidance branches of a step.
        ring: groups around which keys and values of a part of the tokens go.
        ulysses: ranks that exchange tokens for heads.
        tp: ranks that share each weight.
        vae: whether pictures are decoded in bands, one a rank.

    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    vae: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes in the order of `AXES`."""
        return (self.cfg, self.ring, self.ulysses, self.tp)

    @property
    def num_devices(self) -> int:
        """Ranks of the whole mesh."""
        return math.prod(self.sizes)

    @property
    def num_shards(self) -> int:
        """Parts into which the tokens are divided."""
        return self.ring * self.ulysses

    def check(self, facts: ModelFacts) -> None:
        """Refuse a layout that this model cannot have.

        Raises:
            InvalidParameterError: naming the setting, with the numbers.

        """
        if self.cfg > facts.num_branches:
            takes = f"at most {facts.num_branches}, the guidance branches of {facts.name}"
            raise InvalidParameterError("cfg_parallel_size", self.cfg, takes)
        if self.tp > 1 and not facts.tensor_plan:
            raise InvalidParameterError("tp_size", self.tp, f"1: {facts.name} has no tensor-parallel plan")
        if facts.num_heads % self.tp:
            raise InvalidParameterError("tp_size", self.tp, f"a divisor of the {facts.num_heads} heads of {facts.name}")
        local_heads = facts.num_heads // self.tp
        if self.ulysses > 1:
            check_sequence_plan("ulysses_degree", self.ulysses, facts)
            if local_heads % self.ulysses:
                by = f", {facts.num_heads} over tp_size {self.tp}" if self.tp > 1 else ""
                takes = f"a divisor of the {local_heads} heads that a rank has{by}"
                raise InvalidParameterError("ulysses_degree", self.ulysses, takes)
        if self.ring > 1:
            check_sequence_plan("ring_degree", self.ring, facts)
        if self.vae and not facts.row_parallel_vae:
            raise InvalidParameterError("vae_parallel", True, f"false: the VAE of {facts.name} cannot be divided")

    def describe(self) -> str:
        """Return the axes that divide something, as `cfg 2 x ulysses 4`."""
        parts = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(parts) or "one device"


def check_sequence_plan(setting: str, size: int, facts: ModelFacts) -> None:
    """Refuse to divide the tokens of a model that does not say how."""
    if not facts.sequence_plan:
        raise InvalidParameterError(setting, size, f"1: {facts.name} has no sequence-parallel plan")


@dataclass(frozen=True)
class Choice:
    """A layout that was chosen, and why.

    Attributes:
        layout: the sizes.
        reasons: a sentence an axis that divides something.

    """

    layout: ParallelLayout
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.layout.num_devices} devices: {self.layout.describe()}. {' '.join(self.reasons)}".rstrip()


def choose_layout(num_devices: int, facts: ModelFacts, *, device_bytes: int | None = None) -> Choice:
    """Choose the axes for a number of devices.

    Tensor parallelism comes last, and first of all only as much as the weights need to fit. Then guidance branches,
    which exchange least; then Ulysses; then the ring; what is left is tensor parallelism again.

    Args:
        num_devices: how many there are.
        facts: of the model.
        device_bytes: memory of one device; no bound if None.

    Raises:
        InvalidParameterError: where no layout uses all devices, or the weights do not fit.

    """
    tp, reasons = _tp_for_memory(num_devices, facts, device_bytes)
    left = num_devices // tp
    cfg = largest_divisor(left, facts.num_branches)
    left //= cfg
    ulysses = ring = 1
    if facts.sequence_plan:
        ulysses = largest_divisor(left, left, of=facts.num_heads // tp)
        ring = left // ulysses
        left = 1
    if left > 1 and facts.tensor_plan and facts.num_heads % (tp * left) == 0:
        tp, left = tp * left, 1
        reasons += [f"Tensor parallelism takes {tp}: the model says nothing else of how to divide a forward."]
    if left > 1:
        divisible = " or ".join(str(n) for n in range(1, num_devices) if _uses_all(n, facts))
        raise InvalidParameterError("devices", num_devices, f"{divisible}: {facts.name} cannot be divided further")
    layout = ParallelLayout(cfg, ring, ulysses, tp, facts.row_parallel_vae and num_devices > 1)
    layout.check(facts)
    if cfg > 1:
        reasons += [f"CFG first: a step has up to {facts.num_branches} branches, joined once a step."]
    if ulysses > 1:
        reasons += [f"Ulysses next: {facts.num_heads // tp} heads a rank divide by {ulysses}, within one link."]
    if ring > 1:
        reasons += [f"The ring takes {ring}: it needs no divisor of the heads, and overlaps with attention."]
    return Choice(layout, tuple(reasons))


def _tp_for_memory(num_devices: int, facts: ModelFacts, device_bytes: int | None) -> tuple[int, list[str]]:
    """Return the smallest tensor-parallel size with which the weights fit, and the reason."""
    if device_bytes is None or facts.parameter_bytes <= MEMORY_SHARE * device_bytes:
        return 1, []
    weights, room = facts.parameter_bytes / 2**30, MEMORY_SHARE * device_bytes / 2**30
    for tp in range(2, num_devices + 1):
        if facts.tensor_plan and num_devices % tp == 0 and facts.num_heads % tp == 0 and weights / tp <= room:
            return tp, [f"Tensor parallelism takes {tp}: {weights:.1f} GiB of weights, {room:.1f} GiB a device."]
    raise InvalidParameterError(
        "devices", num_devices, f"more, or larger ones: {weights:.1f} GiB of weights, {room:.1f} GiB a device for them"
    )


def _uses_all(num_devices: int, facts: ModelFacts) -> bool:
    """Say whether guidance branches and heads alone use so many devices."""
    left = num_devices // largest_divisor(num_devices, facts.num_branches)
    return left == 1 or facts.sequence_plan or (facts.tensor_plan and facts.num_heads % left == 0)


def largest_divisor(number: int, limit: int, of: int = 0) -> int:
    """Return the largest divisor of `number` up to `limit` that also divides `of` (0 is divided by all)."""
    return max(d for d in range(1, number + 1) if d == 1 or (number % d == 0 and d <= limit and of % d == 0))
