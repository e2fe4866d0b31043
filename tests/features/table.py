"""Every feature by a row, and every pair that is refused. A new technique joins by a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, Literal

from safelight import ServerArgs

Driver = Literal["alone", "interleaved", "stacked"]
"""`SyncExecutor`, one request after another; the engine; the engine with batching="throughput"."""

OFF: Mapping[str, Any] = {"kernels": "plain", "conditioning_cache": "0"}
"""Settings with which everything is off."""
DRIVERS: tuple[Driver, ...] = ("alone", "interleaved", "stacked")


@dataclass(frozen=True)
class Feature:
    """One technique.

    Attributes:
        name: in the table.
        settings: fields of `ServerArgs` that switch it on.
        bound: the largest difference of pixels in [0, 1] from everything off; 0 is equal bytes.
        reason: of the bound.
        driver: how requests are run.
        needs_cuda: whether it is of CUDA alone.
        needs_memory: whether a device's memory is needed; on the CPU a second one stands for it.

    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bound: float = 0.0
    reason: str = "the same operations"
    driver: Driver = "alone"
    needs_cuda: bool = False
    needs_memory: bool = False

    @property
    def is_layout(self) -> bool:
        """Whether it is of several ranks."""
        return ServerArgs(**self.settings).num_devices() > 1


ORDER_OF_SUMS = "sums are in another order"
FEATURES = (
    Feature("interleaving", driver="interleaved"),
    Feature("throughput batching", {}, 1e-5, ORDER_OF_SUMS, driver="stacked"),
    Feature("conditioning cache", {"conditioning_cache": "16MiB"}),
    Feature("kernels", {"kernels": "auto"}, 1e-5, ORDER_OF_SUMS),
    Feature("exact tiles", {"vae_tiling": "exact"}, 1e-5, ORDER_OF_SUMS),
    Feature("offload, components", {"offload": "components"}, needs_memory=True),
    Feature("offload, blocks", {"offload": "blocks"}, needs_memory=True),
    Feature("compile", {"compile": "blocks"}, 1e-5, "operations are fused, and rounded less often"),
    Feature("CUDA graphs", {"cuda_graphs": "steps"}, needs_cuda=True),
    Feature("tensor parallel", {"tp_size": 2}, 1e-5, ORDER_OF_SUMS),
    Feature("Ulysses", {"ulysses_degree": 2}, 1e-5, ORDER_OF_SUMS),
    Feature("ring", {"ring_degree": 2}, 1e-5, ORDER_OF_SUMS),
    Feature("CFG parallel", {"cfg_parallel_size": 2}),
    Feature("VAE parallel", {"vae_parallel": True, "devices": 2}, 1e-5, ORDER_OF_SUMS),
)
FEATURE = {feature.name: feature for feature in FEATURES}


@dataclass(frozen=True)
class Refusal:
    """How a pair is refused.

    Attributes:
        setting: that the error names.
        reason: words of the error.

    """

    setting: str
    reason: str


LAYOUTS = tuple(feature.name for feature in FEATURES if feature.is_layout)
WITH_A_LAYOUT = {
    "exact tiles": Refusal("vae_tiling", "vae_parallel decodes in bands, one a rank"),
    "offload, components": Refusal("offload", "what lies where is planned for one device's memory"),
    "offload, blocks": Refusal("offload", "what lies where is planned for one device's memory"),
    "compile": Refusal("compile", "ranks would have the compiled form at different times"),
    "CUDA graphs": Refusal("cuda_graphs", "graphs do not capture what ranks send each other"),
}
REFUSED: Mapping[frozenset[str], Refusal] = {
    frozenset(("CUDA graphs", "offload, components")): Refusal("cuda_graphs", "a graph holds the weights' addresses"),
    frozenset(("CUDA graphs", "offload, blocks")): Refusal("cuda_graphs", "a graph holds the weights' addresses"),
} | {frozenset((name, layout)): refusal for name, refusal in WITH_A_LAYOUT.items() for layout in LAYOUTS}
"""Whoever makes one of these pairs work takes it out here."""


@dataclass(frozen=True)
class Pair:
    """Two features, or one beside itself: alone."""

    one: Feature
    other: Feature

    def __str__(self) -> str:
        """Return it as a test's name."""
        return self.one.name if self.one is self.other else f"{self.one.name} with {self.other.name}"

    @property
    def names(self) -> frozenset[str]:
        """The names of both."""
        return frozenset((self.one.name, self.other.name))

    @property
    def settings(self) -> dict[str, Any]:
        """What both switch on."""
        return {**OFF, **self.one.settings, **self.other.settings}

    @property
    def bound(self) -> float:
        """The sum of both bounds; of one alone its own."""
        return self.one.bound if self.one is self.other else self.one.bound + self.other.bound

    @property
    def driver(self) -> Driver:
        """The one that does what both ask for: requests that are stacked are interleaved too."""
        return max((self.one.driver, self.other.driver), key=DRIVERS.index)

    @property
    def is_one_setting(self) -> bool:
        """Whether both are values of one setting, of which there is one."""
        shared = self.one.settings.keys() & self.other.settings.keys()
        return any(self.one.settings[name] != self.other.settings[name] for name in shared)

    @property
    def refusal(self) -> Refusal | None:
        """How it is refused; None where it works."""
        return REFUSED.get(self.names)

    @property
    def needs_cuda(self) -> bool:
        """Whether it is of CUDA alone."""
        return self.one.needs_cuda or self.other.needs_cuda

    @property
    def needs_memory(self) -> bool:
        """Whether a device's memory is needed."""
        return self.one.needs_memory or self.other.needs_memory

    @property
    def num_ranks(self) -> int:
        """Ranks that make a request together."""
        return ServerArgs(**self.settings).num_devices()


PAIRS = [
    pair for pair in (Pair(*both) for both in combinations_with_replacement(FEATURES, 2)) if not pair.is_one_setting
]
REFUSED_PAIRS = [pair for pair in PAIRS if pair.refusal is not None]
WORKING_PAIRS = [pair for pair in PAIRS if pair.refusal is None]
