"""What is set once for an engine: each field has one name as flag and keyword. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safelight.core.sizes import parse_size
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "alternates", "components", "blocks", "auto")
BACKENDS = ("auto", "native", "diffusers")


def setting(default: Any, help: str) -> Any:
    """Declare a field of `ServerArgs`, with the help of its flag."""
    return field(default=default, metadata={"help": help})


def settings_per_component(help: str) -> Any:
    """Declare a field that maps components' names to values."""
    return field(default_factory=dict, metadata={"help": help})


@dataclass(frozen=True)
class ServerArgs:
    """What is set once for an engine.

    Attributes:
        model: a folder in Diffusers layout, or a Hub id, optionally with `@revision`; None is the shipped model.
        revision: branch, tag or commit of a Hub id.
        device: `auto` (CUDA where there is one, else the CPU), or a torch device such as `cpu` or `cuda:1`.
        dtype: of every component: `auto` (float32 on the CPU, bfloat16 elsewhere), `float32`, `bfloat16`, `float16`.
        component_dtypes: exceptions, by the component's name.
        backend: `auto` (a family of ours, or else the diffusers package), `native` or `diffusers`.
        attention_backend: `auto`, or a name from the table in `safelight.attention`.
        offload: what waits on the host until it is used: `none`; `alternates`, of components of which a step needs one
            the others; `components`, whichever have no room; `blocks`, and of the transformer those blocks that have
            none; `auto`, the first of these that fits the memory limit.
        memory_limit: bytes of the device's memory that may be used, or such as `24GiB`; None is what is free.

    """

    model: str | None = setting(None, "A folder, or a Hub id with optional @revision.  [default: the shipped model]")
    revision: str | None = setting(None, "Branch, tag or commit of a Hub id.")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...  [default: auto]")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16.  [default: auto]")
    component_dtypes: Mapping[str, str] = settings_per_component("A component's own, as vae=float32; may be repeated.")
    backend: str = setting("auto", "auto (a family of ours, or else diffusers), native or diffusers.  [default: auto]")
    attention_backend: str = setting("auto", "auto, sdpa, math, flash, efficient or cudnn.  [default: auto]")

    offload: str = setting(
        "none", "What waits on the host: none, alternates, components, blocks, or auto.  [default: none]"
    )
    memory_limit: int | str | None = setting(
        None, "Of the device, such as 24GiB, 500MB, or bytes.  [default: what is free]"
    )

    def __post_init__(self) -> None:
        """Refuse a dtype that there is not, by the name of its field."""
        takes = ", ".join(DTYPES)
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidParameterError("dtype", self.dtype, f"auto, {takes}")
        if self.backend not in BACKENDS:
            raise InvalidParameterError("backend", self.backend, ", ".join(BACKENDS))
        if self.offload not in OFFLOADS:
            raise InvalidParameterError("offload", self.offload, ", ".join(OFFLOADS))
        self.memory_limit_bytes()
        for component, dtype in self.component_dtypes.items():
            if dtype not in DTYPES:
                raise InvalidParameterError(f"component_dtypes[{component!r}]", dtype, takes)

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
