"""The memory plan: what of a model lies on the device at each stage, so that a request fits into a limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from safelight.acceleration.memory import BUFFER_BYTES, NUM_BUFFERS
from safelight.acceleration.offload import NUM_SLOTS, spread
from safelight.core.byte_sizes import shown_size
from safelight.core.residency import Residency
from safelight.errors import InvalidParameterError

MODES = ("none", "alternates", "components", "blocks")
"""From the cheapest to that which needs least memory."""
WORKSPACE = 2**30
"""Bytes of the limit that are left to the libraries: their modules, what kernels need within one (cuDNN's layouts of a
large picture above all), and what lies unused between the allocator's blocks."""
HOST_BANDWIDTH = 25e9
"""Bytes a second from the host to the device, about those of PCIe 4.0 with 16 lanes, for a bound of time."""


@dataclass(frozen=True)
class ComponentFootprint:
    """What one component takes.

    Attributes:
        num_bytes: of its weights in one buffer on the device.
        dtypes: of its weights, the one of most bytes first.
        block_bytes: of each of its repeated blocks, in the order in which they run; empty if it has none.
        is_alternate: whether it is one of those of which a step needs one.

    """

    num_bytes: int
    dtypes: tuple[str, ...] = ()
    block_bytes: tuple[int, ...] = ()
    is_alternate: bool = False


@dataclass(frozen=True)
class StageFootprint:
    """What one component does for a request in one stage.

    Attributes:
        stage: its name in the pipeline.
        component: which runs.
        activations: the most bytes that are alive on the device besides weights, what the request holds among them.

    """

    stage: str
    component: str
    activations: int


@dataclass(frozen=True)
class Footprint:
    """What a request of one size needs of a model.

    Attributes:
        components: of the components with weights, by name.
        stages: in the order in which they run.
        tiled: the same where the VAE decodes in tiles; None where it cannot.
        num_branches: forwards of a denoising step, one a guidance branch.
        request: the size, in words.
        kept: bytes that stay on the device besides, of earlier requests: the conditioning cache, where it is there.

    """

    components: Mapping[str, ComponentFootprint]
    stages: Sequence[StageFootprint]
    num_branches: int
    request: str
    tiled: Sequence[StageFootprint] | None = None
    kept: int = 0

    @property
    def reserve(self) -> int:
        """Bytes of the limit that are neither weights nor activations."""
        return WORKSPACE + self.kept


@dataclass(frozen=True)
class PlannedStage:
    """What lies on the device in one stage.

    Attributes:
        footprint: what the stage does.
        resident: the components whose weights are on the device, at most, over a request and the one after it.
        weights: bytes of these.

    """

    footprint: StageFootprint
    resident: tuple[str, ...]
    weights: int

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.weights + self.footprint.activations


@dataclass(frozen=True)
class MemoryPlan:
    """What lies where, and what it costs.

    Attributes:
        offload: one of `MODES`.
        tiled: whether the VAE decodes in tiles.
        limit: bytes of the device that may be used.
        footprint: what was planned for.
        placed: the components that come and go.
        resident_blocks: of those whose blocks stream, how many stay on the device.
        rooms: for each placed component, the bytes that placed ones may take together while it runs.
        stages: in the order in which they run.
        bytes_a_request: copied to the device for a request that follows another, besides those of its steps.
        bytes_a_step: copied to the device for a denoising step, at most.
        pinned: bytes of the host's memory that stay pinned.
        refused: for each cheaper way, why it is not taken.

    """

    offload: str
    tiled: bool
    limit: int
    footprint: Footprint
    placed: tuple[str, ...] = ()
    resident_blocks: Mapping[str, int] = field(default_factory=dict)
    rooms: Mapping[str, int] = field(default_factory=dict)
    stages: Sequence[PlannedStage] = ()
    bytes_a_request: int = 0
    bytes_a_step: int = 0
    pinned: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def fullest(self) -> PlannedStage:
        """The stage with the most bytes on the device."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak(self) -> int:
        """The most bytes on the device, without what is reserved."""
        return self.fullest.peak

    @property
    def fits(self) -> bool:
        """Whether it keeps within the limit."""
        return self.peak + self.footprint.reserve <= self.limit

    @property
    def host_bytes(self) -> int:
        """Bytes of weights that lie on the host, in mapped files where these have the planned dtypes."""
        return sum(self.footprint.components[name].num_bytes for name in self.placed)

    @property
    def seconds_a_step(self) -> float:
        """The least seconds of a step that its copies allow, at `HOST_BANDWIDTH`."""
        return self.bytes_a_step / HOST_BANDWIDTH

    def lines(self) -> list[str]:
        """Say in a few lines what was chosen, and why."""
        streamed = [
            f"{name} keeps {count} of its {len(self.footprint.components[name].block_bytes)} blocks on the device"
            for name, count in self.resident_blocks.items()
        ]
        return [
            f"offload={self.offload}{', VAE in tiles' if self.tiled else ''}: {shown_size(self.peak)} of "
            f"{shown_size(self.limit)} for {self.footprint.request}, most in {self.fullest.footprint.stage}",
            *(f"not {way}: {why}" for way, why in self.refused.items()),
            *streamed,
            f"copied: {shown_size(self.bytes_a_request)} a request, {shown_size(self.bytes_a_step)} a step; "
            f"on the host: {shown_size(self.host_bytes)} of weights, {shown_size(self.pinned)} pinned",
        ]


def make_plan(footprint: Footprint, limit: int, offload: str = "auto") -> MemoryPlan:
    """Return the cheapest plan that fits.

    Args:
        footprint: what the model needs.
        limit: bytes of the device that may be used.
        offload: one of `MODES`, or `auto` for the first of them that fits. Tiles are taken where it fits only so.

    Raises:
        InvalidParameterError: if nothing fits, with the bytes that are needed; or if the model has no such offload.

    """
    refused: dict[str, str] = {}
    least: MemoryPlan | None = None
    for mode in possible_modes(footprint, offload):
        for tiled in (False, True) if footprint.tiled is not None else (False,):
            plan = plan_mode(footprint, limit, mode, tiled)
            if plan.fits:
                return replace(plan, refused=refused)
            at = plan.fullest
            refused[f"{mode}{' with tiles' if tiled else ''}"] = f"{at.footprint.stage} needs {shown_size(at.peak)}"
            least = plan if least is None or plan.peak < least.peak else least
    assert least is not None
    at = least.fullest
    raise InvalidParameterError(
        "memory_limit",
        shown_size(limit),
        f"{shown_size(least.peak + footprint.reserve, up=True)} or more for {footprint.request} "
        f"with offload={least.offload}"
        f"{' and tiles' if least.tiled else ''}: {at.footprint.stage} needs {shown_size(at.weights)} of weights "
        f"({', '.join(at.resident)}) and {shown_size(at.footprint.activations)} of activations",
    )


def possible_modes(footprint: Footprint, offload: str) -> Sequence[str]:
    """Return the modes that there are for a model, of those asked for.

    Raises:
        InvalidParameterError: if it is none.

    """
    components = footprint.components.values()
    impossible = {}
    if sum(component.is_alternate for component in components) < 2:
        impossible["alternates"] = "none for this model, which has one transformer"
    if not any(component.block_bytes for component in components):
        impossible["blocks"] = "none for this model, which has no repeated blocks"
    if offload in impossible:
        raise InvalidParameterError("offload", offload, impossible[offload])
    return [mode for mode in MODES if mode not in impossible and offload in ("auto", mode)]


def plan_mode(footprint: Footprint, limit: int, mode: str, tiled: bool) -> MemoryPlan:
    """Return the plan of one mode, whether or not it fits."""
    stages = footprint.tiled if tiled else footprint.stages
    assert stages is not None
    components = footprint.components
    placed = placed_components(components, mode)
    fixed = sum(component.num_bytes for name, component in components.items() if name not in placed)
    rooms = rooms_of(stages, placed, limit - footprint.reserve - fixed)
    if mode == "alternates":  # one at a time, even where there is room for more
        rooms = {name: components[name].num_bytes for name in placed}
    streaming = [name for name, component in components.items() if component.block_bytes and mode == "blocks"]
    resident_blocks = {name: most_resident(components[name], rooms[name]) for name in streaming}
    streams = {name: Streamed.of(components[name], count) for name, count in resident_blocks.items()}
    sizes = {name: streams.get(name, component).num_bytes for name, component in components.items()}
    planned, brought = simulate(stages, sizes, placed, rooms)
    return MemoryPlan(
        offload=mode,
        tiled=tiled,
        limit=limit,
        footprint=footprint,
        placed=placed,
        resident_blocks=resident_blocks,
        rooms=rooms,
        stages=planned,
        bytes_a_request=brought,
        bytes_a_step=max((footprint.num_branches * stream.bytes_a_call for stream in streams.values()), default=0),
        pinned=NUM_SLOTS * max((stream.slot_bytes for stream in streams.values()), default=0)
        + (NUM_BUFFERS * BUFFER_BYTES if placed else 0),
    )


def placed_components(components: Mapping[str, ComponentFootprint], mode: str) -> tuple[str, ...]:
    """Return the names of those that wait on the host until they are used."""
    if mode == "none":
        return ()
    return tuple(name for name, component in components.items() if mode != "alternates" or component.is_alternate)


def rooms_of(stages: Sequence[StageFootprint], placed: Sequence[str], limit: int) -> dict[str, int]:
    """Return the bytes that placed components may take together while each of them runs."""
    most = {name: max((stage.activations for stage in stages if stage.component == name), default=0) for name in placed}
    return {name: max(0, limit - activations) for name, activations in most.items()}


@dataclass(frozen=True)
class Streamed:
    """What a component takes whose blocks stream.

    Attributes:
        num_bytes: on the device: what stays, and the slots.
        slot_bytes: of the largest block that streams.
        bytes_a_call: copied for a forward.

    """

    num_bytes: int
    slot_bytes: int
    bytes_a_call: int

    @classmethod
    def of(cls, component: ComponentFootprint, num_resident: int) -> Streamed:
        """Return what it takes with so many blocks that stay."""
        staying = spread(num_resident, len(component.block_bytes))
        streamed = [size for index, size in enumerate(component.block_bytes) if index not in staying]
        slot = max(streamed)
        # No more blocks than slots stay where they are.
        copied = sum(streamed) if len(streamed) > NUM_SLOTS else 0
        return cls(component.num_bytes - sum(streamed) + NUM_SLOTS * slot, slot, copied)


def most_resident(component: ComponentFootprint, room: int) -> int:
    """Return how many blocks may stay on the device; 0 if even without them there is no room."""
    counts = range(len(component.block_bytes) - NUM_SLOTS)
    fitting = [count for count in counts if Streamed.of(component, count).num_bytes <= room]
    return max(fitting, default=0)


@dataclass
class Counted:
    """A component that is only counted."""

    num_bytes: int

    def enter(self) -> None:
        """Nothing is copied."""

    def leave(self) -> None:
        """Nothing is freed."""


def simulate(
    stages: Sequence[StageFootprint], sizes: Mapping[str, int], placed: Sequence[str], rooms: Mapping[str, int]
) -> tuple[list[PlannedStage], int]:
    """Return what lies on the device at each stage, and the bytes brought for a request that follows another.

    The components come and go as they will when the model runs: by the same `Residency`.
    """
    fixed = {name: size for name, size in sizes.items() if name not in placed}
    residency = Residency({name: Counted(sizes[name]) for name in placed}, rooms)
    runs = [list(run(stages, residency, fixed)) for _ in range(2)]
    before = residency.bytes_brought
    for _ in run(stages, residency, fixed):
        pass
    return [max(pair, key=lambda stage: stage.weights) for pair in zip(*runs, strict=True)], (
        residency.bytes_brought - before
    )


def run(stages: Sequence[StageFootprint], residency: Residency, fixed: Mapping[str, int]) -> Iterator[PlannedStage]:
    """Yield what lies on the device at each stage of one request."""
    for stage in stages:
        residency.bring([stage.component])
        yield PlannedStage(stage, (*fixed, *residency.resident()), sum(fixed.values()) + residency.num_bytes)
