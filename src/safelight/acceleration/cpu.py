"""What makes a model faster on the CPU: the plan for this processor, and its application to a module.

The plan is a function of the processor's maker and flags, and of a check of exactness whose sizes and numbers are
always the same. Nothing is timed at start: a timing on a busy machine could fall out otherwise at the next start, and
then a job that is run again would not give its bytes. The rules were found by `python -m benchmarks.cpu`, and by the
measurements named beside them; where none was made, the processor computes as torch does.

No setting of the process is changed: other threads, other models and the caller's own code find torch as they left it.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import nn

from safelight.acceleration.cpu_products import (
    FusedGELUProjection,
    OneDNNLinear,
    Product,
    WidenedLinear,
    is_float32,
    onednn_linear,
)
from safelight.layers.linear import GELUProjection

logger = logging.getLogger(__name__)

X86 = frozenset({"x86_64", "amd64"})
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""Flags of x86 processors that multiply bfloat16 in hardware."""


@dataclass(frozen=True)
class Processor:
    """What the plan depends on.

    Attributes:
        architecture: such as `x86_64` or `aarch64`.
        vendor: as the processor names its maker: `GenuineIntel`, `AuthenticAMD`; empty where unknown.
        flags: as Linux names them; empty where unknown.

    """

    architecture: str
    vendor: str
    flags: frozenset[str]


@dataclass(frozen=True)
class CpuPlan:
    """What is computed otherwise than torch would by itself.

    Attributes:
        onednn_products: float32 linear layers by oneDNN. torch's MKL is slower on AMD's processors with
            AVX-512: 118 GFLOP/s a thread against 248 (Zen 5), 94 against 104 (Zen 4). On Intel's they are equal.
        fused_gelu: linear layers with GELU as one operator of oneDNN; GELU's tanh costs a quarter of the product.
        widened_bfloat16: bfloat16 linear layers and convolutions in float32, rounded once, where the processor has no
            bfloat16 instructions: 26 GFLOP/s against 105 (Cascade Lake).
        channels_last: VAEs for pictures with channels last in memory, without needless copies, and their large
            convolutions with a quarter of the multiplications.

    """

    onednn_products: bool = False
    fused_gelu: bool = False
    widened_bfloat16: bool = False
    channels_last: bool = False


PLAIN = CpuPlan()
"""Everything as torch does it."""


def this_processor() -> Processor:
    """Return what Linux says of the first processor; elsewhere the architecture alone."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if path.is_file() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = said.get("flags") or said.get("Features") or ""
    return Processor(platform.machine().lower(), said.get("vendor_id", ""), frozenset(flags.split()))


def make_plan(processor: Processor, has_onednn: bool, is_exact: Callable[[Product], bool] = is_float32) -> CpuPlan:
    """Return the plan for a processor.

    Args:
        processor: its maker and flags.
        has_onednn: whether torch was built with oneDNN.
        is_exact: says of a float32 product whether it is one.

    """
    if processor.architecture not in X86 or not has_onednn:
        return PLAIN
    has_avx512 = "avx512f" in processor.flags
    exact = has_avx512 and is_exact(onednn_linear)
    return CpuPlan(
        onednn_products=exact and processor.vendor == "AuthenticAMD",
        fused_gelu=exact,
        widened_bfloat16="avx2" in processor.flags and BFLOAT16_FLAGS.isdisjoint(processor.flags),
        channels_last=has_avx512,
    )


@cache
def cpu_plan() -> CpuPlan:
    """Return the plan for this processor; made, and logged, once a process."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    plan = make_plan(this_processor(), has_onednn)
    chosen = [field.name for field in fields(plan) if vars(plan)[field.name]]
    logger.info("on the CPU: %s", ", ".join(chosen) or "as torch computes")
    return plan


def route_products(module: nn.Module, plan: CpuPlan) -> None:
    """Have linear layers below `module` computed faster, in place.

    Layers become of a subclass without state of its own: names in the state dict, and the parameters, stay. Layers of
    other classes than `nn.Linear` itself, such as quantised ones, are left alone.

    Args:
        module: a component, with its weights in their final dtype.
        plan: `cpu_plan()`, or `PLAIN`, which changes nothing.

    """
    layers = list(module.modules())
    inside = {id(layer.proj) for layer in layers if plan.fused_gelu and type(layer) is GELUProjection}
    for layer in layers:
        if id(layer) not in inside:
            layer.__class__ = _faster(layer, plan)


def _faster(layer: nn.Module, plan: CpuPlan) -> type[nn.Module]:
    """Return the class that computes as a layer's own does, and faster; its own where there is none."""
    if type(layer) is GELUProjection:
        return FusedGELUProjection if plan.fused_gelu and _is_routed(layer.proj, plan) else GELUProjection
    if type(layer) is nn.Linear and _is_routed(layer, plan):
        if layer.weight.dtype is torch.bfloat16:
            return WidenedLinear
        if plan.onednn_products:
            return OneDNNLinear
    return type(layer)


def _is_routed(layer: nn.Linear, plan: CpuPlan) -> bool:
    dtype = layer.weight.dtype
    return dtype is torch.float32 or (dtype is torch.bfloat16 and plan.widened_bfloat16)
