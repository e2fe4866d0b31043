"""What is set once for an engine. Every field has one name as flag, keyword and, later, configuration key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from safelight.errors import InvalidParameterError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ServerArgs:
    """What is set once for an engine.

    Attributes:
        model: a folder in Diffusers layout, or a Hub id, optionally with `@revision`; None is the shipped model.
        revision: branch, tag or commit of a Hub id.
        device: `auto` (CUDA where there is one, else the CPU), or a torch device such as `cpu` or `cuda:1`.
        dtype: of every component: `auto` (float32 on the CPU, bfloat16 elsewhere), `float32`, `bfloat16`, `float16`.
        component_dtypes: exceptions, by the component's name.
        attention_backend: `auto`, or a name from the table in `safelight.attention`.

    """

    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    component_dtypes: Mapping[str, str] = field(default_factory=dict)
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a dtype that there is not, by the name of its field."""
        takes = ", ".join(DTYPES)
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidParameterError("dtype", self.dtype, f"auto, {takes}")
        for component, dtype in self.component_dtypes.items():
            if dtype not in DTYPES:
                raise InvalidParameterError(f"component_dtypes[{component!r}]", dtype, takes)

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            InvalidParameterError: where there is no such device.

        """
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
        if component in self.component_dtypes:
            return DTYPES[self.component_dtypes[component]]
        if precision is not None:
            return DTYPES[precision]
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if self.torch_device().type == "cpu" else torch.bfloat16
