"""What is set once for an engine: each field has one name as flag, key and keyword. Importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelight.core.byte_sizes import parse_size
from safelight.core.options import check_settings, listed, option
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "alternates", "components", "blocks", "auto")
PARALLEL_SIZES = ("cfg_parallel_size", "ring_degree", "ulysses_degree", "tp_size")
"""Settings whose product is the number of devices, from the slowest link to the fastest."""


@dataclass(frozen=True)
class ServerArgs:
    """What is set once for an engine.

    Attributes:
        model: a folder in Diffusers layout, or a Hub id, optionally with `@revision`; None is the shipped model.
        revision: branch, tag or commit of a Hub id.
        variant: of the weights: `fp16` reads `model.fp16.safetensors`, of every component that has it, as in Diffusers;
            None reads the plain files, or, where a component has none, the one variant that there is.
        pipeline: class name of the pipeline that runs the model; None is the one that its index names.
        component: components from elsewhere, by name, each a folder or a Hub id: what the index lacks or has otherwise.
        device: `auto` (CUDA where there is one, else the CPU), or a torch device such as `cpu` or `cuda:1`.
        dtype: of every component: `auto` (float32 on the CPU, bfloat16 elsewhere), `float32`, `bfloat16`, `float16`.
        component_dtypes: exceptions, by the component's name.
        backend: `auto` (a family of ours, or else the diffusers package), `native` or `diffusers`.
        attention_backend: `auto`, or a name from the table in `safelight.attention`.
        kernels: `auto`, operations that are fast on this device where a check has shown them as exact as torch's own,
            or `plain`, torch's own.
        devices: for one request; the product of the next four, or, alone, a number for which a planner chooses them.
        cfg_parallel_size, ring_degree, ulysses_degree, tp_size: how devices share a request: guidance branches, parts
            of the tokens in a ring, tokens for heads, weights.
        vae_parallel: whether devices share the decoding too.
        conditioning_cache: bytes of what encoders made that are kept for later requests, such as `256MiB`; `0` is none.
        compile: `none`, or `blocks`: each class of the transformer's repeated blocks is compiled once.
        cuda_graphs: `none`, or `steps`: model calls that are bound by launches are captured once a shape, and replayed.
        vae_tiling: `none`, or `exact`: decode by bands, of equal pixels within rounding.
        offload: what waits on the host until it is used: `none`; `alternates`, of components of which a step needs one
            the others; `components`, whichever have no room; `blocks`, and of the transformer those blocks that have
            none; `auto`, the first of these that fits the memory limit.
        memory_limit: bytes of the device's memory that may be used, or such as `24GiB`; None is what is free.

    """

    model: str | None = option("text", "A folder, or a Hub id with optional @revision.  [default: the shipped model]")
    revision: str | None = option("text", "Branch, tag or commit of a Hub id.")
    variant: str | None = option("text", "Of the weights, such as fp16.  [default: none, or the only one there is]")
    pipeline: str | None = option("text", "Class name of a pipeline.  [default: the one that the model's index names]")
    component: Mapping[str, str] = option(
        "by component", "One from elsewhere, as controlnet=PATH or controlnet=HUB_ID; may be repeated.", {}
    )
    device: str = option("text", "auto, cpu, cuda, cuda:1, ...", "auto")
    dtype: str = option("choice", f"auto, {listed(DTYPES)}.", choices=("auto", *DTYPES))
    component_dtypes: Mapping[str, str] = option(
        "by component", "A component's own, as vae=float32; may be repeated.", {}
    )
    backend: str = option(
        "choice",
        "auto (a family of ours, or else diffusers), native or diffusers.",
        choices=("auto", "native", "diffusers"),
    )
    attention_backend: str = option(
        "text", "auto, chunked, sdpa, math, flash, efficient, cudnn, flash3 or sage.", "auto"
    )
    kernels: str = option(
        "choice", "auto: fused and fast operations where they are checked, or plain.", choices=("auto", "plain")
    )

    offload: str = option("choice", f"What waits on the host: {listed(OFFLOADS, ', or ')}.", choices=OFFLOADS)
    memory_limit: int | str | None = option(
        "size", "Of the device, such as 24GiB, 500MB, or bytes.  [default: what is free]"
    )
    compile: str = option(
        "choice", "none, or blocks: compile the transformer's repeated blocks.", choices=("none", "blocks")
    )
    cuda_graphs: str = option(
        "choice", "none, or steps: replay steps that are bound by launches.", choices=("none", "steps")
    )

    devices: int = option("count", "Devices for one request; a planner chooses how they share it.", 1, minimum=1)
    cfg_parallel_size: int = option(
        "count", "Groups of devices that share the guidance branches of a step.", 1, minimum=1
    )
    ring_degree: int = option("count", "Devices around which keys and values of a part of the tokens go.", 1, minimum=1)
    ulysses_degree: int = option("count", "Devices that exchange tokens for attention heads.", 1, minimum=1)
    tp_size: int = option("count", "Devices that share each weight of the transformer.", 1, minimum=1)
    vae_parallel: bool = option("boolean", "Decode in bands, one a device.", False)
    vae_tiling: str = option(
        "choice",
        "none, or exact: decode by bands, of equal pixels within rounding and less than half the memory.",
        choices=("none", "exact"),
    )
    conditioning_cache: str = option(
        "size", "Bytes of prompt and image embeddings that are kept for later requests; 0 is none.", "256MiB"
    )

    def __post_init__(self) -> None:
        """Refuse what a field does not take, and sizes and numbers of devices that do not fit, by the field's name."""
        check_settings(self)
        for component, dtype in self.component_dtypes.items():
            if dtype not in DTYPES:
                raise InvalidParameterError(f"component_dtypes[{component!r}]", dtype, ", ".join(DTYPES))
        self.conditioning_cache_bytes()
        self.num_devices()
        self.memory_limit_bytes()

    def num_devices(self) -> int:
        """Return how many devices share a request.

        Raises:
            InvalidParameterError: if the sizes do not fit each other.

        """
        sizes = {name: vars(self)[name] for name in PARALLEL_SIZES}
        product: int = math.prod(sizes.values())
        if product > 1 and self.devices not in (1, product):
            factors = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            raise InvalidParameterError("devices", self.devices, f"{product}, which is {factors}; or nothing")
        return max(product, self.devices)

    def conditioning_cache_bytes(self) -> int:
        """Return how many bytes of embeddings are kept.

        Raises:
            InvalidParameterError: if it is no size.

        """
        return 0 if self.conditioning_cache == "0" else parse_size(self.conditioning_cache, "conditioning_cache")

    def memory_limit_bytes(self) -> int | None:
        """Return the memory limit in bytes.

        Raises:
            InvalidParameterError: if it is none.

        """
        return None if self.memory_limit is None else parse_size(self.memory_limit, "memory_limit")

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            InvalidParameterError: where there is no such device.

        """
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch raises either, by how the device is missing
            raise InvalidParameterError(
                "device", self.device, "auto, cpu, or a device that torch finds here"
            ) from error
        return device

    def component_dtype(self, component: str, precision: str | None = None) -> torch.dtype:
        """Return the dtype of a component.

        Args:
            component: its name in `model_index.json`.
            precision: what the model prescribes for it whatever the rest has.

        """
        import torch

        by_device = "float32" if self.torch_device().type == "cpu" else "bfloat16"
        common = by_device if self.dtype == "auto" else self.dtype
        dtype: torch.dtype = vars(torch)[self.component_dtypes.get(component, precision or common)]
        return dtype
