"""`ComponentPlan`: what is decided of a component before it is loaded; and how that is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safelight.acceleration.apply import accelerate
from safelight.attention import set_attention_backend
from safelight.core.config import PipelineConfig
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import resolve_class
from safelight.core.server_args import ServerArgs
from safelight.loading.alignment import align_weights
from safelight.loading.classes import Source, library_of
from safelight.loading.components import empty_component, load_component, warn_of_unused
from safelight.loading.description import sources
from safelight.loading.repository import Repository
from safelight.parallel.apply import waits_on_host
from safelight.parallel.collectives import Communicator
from safelight.parallel.mesh import Mesh
from safelight.parallel.plans import tensor_plan
from safelight.parallel.tensor import connect_shards

HOST = torch.device("cpu")


@dataclass(frozen=True)
class ComponentPlan:
    """How one component is loaded. It follows from JSON and settings alone.

    Attributes:
        name: in `model_index.json`.
        source: its class, and where its weights lie.
        dtype: of its weights.
        device: where it computes.
        home: where its weights are laid.
        comes_and_goes: whether they wait at home until they are used.
        attention_backend: of its attention layers, as the setting says it.
        kernels: `auto`, or `plain` for operations as torch has them.
        shards: the ranks that share its weights, if its class has a tensor-parallel plan.
        treatments: what is done to the module when its weights are there, in this order: fewer bits, or an adapter that
            stays.

    """

    name: str
    source: Source
    dtype: torch.dtype
    device: torch.device
    home: torch.device
    comes_and_goes: bool
    attention_backend: str
    kernels: str
    shards: Communicator
    treatments: tuple[Callable[[nn.Module], None], ...] = ()

    def empty(self) -> nn.Module:
        """Return the component without weights, on the meta device; of one that is no module there is none."""
        return empty_component(self.source, self.dtype)

    def load(self) -> Any:
        """Carry it out.

        Raises:
            ModelError: if the component cannot be loaded.

        """
        loaded = load_component(self.source, self.dtype, self.home, (self.shards.rank, self.shards.size))
        warn_of_unused(self.source.folder, resolve_class(self.source.target))
        if isinstance(loaded, nn.Module):
            self._prepare(loaded)
        return loaded

    def _prepare(self, module: nn.Module) -> None:
        """Treat a module that has its weights, lay them, choose what it computes by, and connect its shards."""
        for treat in self.treatments:
            treat(module)
        if self.device == HOST and not self.comes_and_goes:  # elsewhere weights are copied before they are used
            align_weights(module)
        set_attention_backend(module, self.attention_backend, self.device.type, self.dtype)
        accelerate(module, self.kernels, self.device, self.dtype)
        if tensor_plan(module) is not None:
            connect_shards(module, self.shards)


def plan_components(
    repository: Repository,
    pipeline_cls: type[ComposedPipeline],
    config: PipelineConfig,
    server_args: ServerArgs,
    mesh: Mesh,
    placed: frozenset[str] = frozenset(),
    vae_in_bands: bool = False,
) -> list[ComponentPlan]:
    """Return the plan of each component, in the order in which they are loaded.

    Our own classes come first: they are mapped in no time, and tell whether the settings fit the model.

    Args:
        repository: the model.
        pipeline_cls: its pipeline.
        config: its conventions.
        server_args: the settings.
        mesh: of the ranks that load it together.
        placed: components that come and go.
        vae_in_bands: whether the VAE decodes in bands, which walk the library's own modules.

    """
    device = server_args.torch_device()
    found = sources(repository, pipeline_cls).items()
    return [
        ComponentPlan(
            name,
            source,
            dtype=server_args.component_dtype(name, config.precisions.get(name)),
            device=device,
            home=HOST if name in placed or waits_on_host(name, mesh) else device,
            comes_and_goes=name in placed,
            attention_backend=server_args.attention_backend,
            kernels="plain" if name == "vae" and vae_in_bands else server_args.kernels,
            shards=mesh.tp,
        )
        for name, source in sorted(found, key=lambda item: library_of(item[1].target) is not None)
    ]
