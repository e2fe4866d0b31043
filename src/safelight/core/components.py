"""`Components`: what a model was loaded as, with everything that was decided about it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from safelight.core.residency import Residency
from safelight.core.stage_memory import StageMemory
from safelight.core.trees import Tree

if TYPE_CHECKING:
    from safelight.core.model_runner import Wrapper
    from safelight.stages.vae import VAE

Methods = Mapping[str, Callable[..., Tree]]
"""What a component can do beside `forward`: functions of the component and a call's arguments."""


@dataclass(frozen=True)
class Components:
    """A model's components, loaded, and how they are run. It is made once, by whoever loads.

    Attributes:
        modules: by their names in `model_index.json`.
        vae: how the component `vae` is run; None for the library's own way.
        residency: which of them lie on the device; None if all stay where they are.
        weights: digest of each component's weights.
        empty: by name, what makes a component without weights, on the meta device, where that is known.
        count_memory: counts what each stage takes beside weights; of a model that cannot be counted, nothing.
        over_ranks: has the ranks of a group make calls together; None for one rank.
        shares_branches: whether the guidance branches of a step run on different ranks.

    """

    modules: Mapping[str, Any]
    vae: VAE | None = None
    residency: Residency | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    empty: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    count_memory: Callable[[], tuple[StageMemory, ...]] = tuple
    over_ranks: Wrapper | None = None
    shares_branches: bool = False
