"""The CPU's plan beside Diffusers' default: a small FLUX-like transformer, and the decoder of a VAE for pictures.

Errors are relative to Diffusers in float32 on the same weights and inputs, whatever dtype they were rounded to. The VAE
is compared with its float32 default in both dtypes. `--compile` adds rows with the transformer's repeated blocks
compiled by `torch.compile`. "Limit" is how many times faster than Diffusers the transformer would be if its linear
layers and its attention, as Safelight routes them, were all that takes time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    as_diffusers_calls,
    as_safelight_calls,
    as_tensor,
    begin,
    interleaved,
    print_table,
    relative_error,
)
from benchmarks.stacks import STACKS, Grid
from safelight.acceleration.cpu import PLAIN, cpu_plan, route_products
from safelight.acceleration.cpu_products import FusedGELUProjection
from safelight.attention import Attention, set_attention_backend
from safelight.loading.vaes import run_vae

QUICK: Grid = (1, 8, 8)
WANTED = {
    ("transformer", torch.float32): 1.8,
    ("transformer", torch.bfloat16): 1.4,
    ("VAE", torch.float32): 1.2,
    ("VAE", torch.bfloat16): 2.2,
}
WIDTHS, QUICK_WIDTHS = (128, 256, 512, 512), (32, 32, 64, 64)
OURS, THEIRS, PRODUCTS = "Safelight", "Diffusers", "products"


@dataclass(frozen=True)
class Side:
    """One way to compute: what to call, and the error of what it made; None for what makes nothing to compare."""

    run: Callable[[], object]
    error: float | None


def transformer_sides(dtype: torch.dtype, grid: Grid, compiled: bool) -> dict[str, Side]:
    """Return Diffusers' transformer and ours in `dtype`, and the linear layers and attention of ours alone."""
    stack = STACKS["flux"]
    architecture = stack.small.architecture
    reference = stack.diffusers_transformer(architecture, dtype)
    inputs = stack.inputs(stack.small, grid, dtype)
    yardstick = as_diffusers_calls(stack.diffusers_transformer(architecture, dtype).float())
    exact = as_tensor(yardstick(**inputs.to(torch.float32).for_diffusers()))
    ours = stack.our_transformer(architecture, reference.state_dict())
    set_attention_backend(ours, "auto", "cpu", dtype)
    route_products(ours, cpu_plan())
    products = products_of(ours, lambda: as_safelight_calls(ours)(**inputs.for_safelight()))
    if compiled:
        for kind in stack.blocks:
            for block in ours.get_submodule(kind.attribute).children():
                block.compile()
    theirs, mine = as_diffusers_calls(reference), as_safelight_calls(ours)
    for_theirs, for_mine = inputs.for_diffusers(), inputs.for_safelight()
    return {
        THEIRS: Side(lambda: theirs(**for_theirs), relative_error(as_tensor(theirs(**for_theirs)), exact)),
        OURS: Side(lambda: mine(**for_mine), relative_error(as_tensor(mine(**for_mine)), exact)),
        PRODUCTS: Side(products, None),
    }


def products_of(transformer: nn.Module, forward: Callable[[], object]) -> Callable[[], None]:
    """Return what calls the layers of a transformer that multiply matrices, and no other, on what a forward gave them.

    Args:
        transformer: has its routes.
        forward: runs it once.

    """
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    layers = [
        layer for layer in transformer.modules() if isinstance(layer, (nn.Linear, FusedGELUProjection, Attention))
    ]
    hooks = [layer.register_forward_pre_hook(lambda *call: calls.append(call)) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()

    @torch.inference_mode()
    def multiply() -> None:
        for layer, given in calls:
            layer(*given)

    return multiply


def make_vae(widths: tuple[int, ...]) -> Any:
    """Return an `AutoencoderKL` of FLUX's kind with random weights, in float32."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.eval().requires_grad_(False)


def vae_sides(dtype: torch.dtype, size: int, widths: tuple[int, ...]) -> dict[str, Side]:
    """Return Diffusers' float32 decode and ours in `dtype`, of a square picture."""
    reference = make_vae(widths)
    ours = deepcopy(reference).to(dtype)
    route_products(ours, cpu_plan())
    run_vae(ours, cpu_plan=cpu_plan())
    latents = torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def theirs() -> Tensor:
        decoded: Tensor = reference.decode(latents, return_dict=False)[0]
        return decoded

    @torch.inference_mode()
    def mine() -> Tensor:
        decoded: Tensor = ours.decode(latents.to(dtype), return_dict=False)[0]
        return decoded

    exact = theirs()
    return {THEIRS: Side(theirs, 0.0), OURS: Side(mine, relative_error(mine(), exact))}


def row(what: str, dtype: torch.dtype, label: str, sides: Mapping[str, Side], rounds: int) -> list[str]:
    """Measure both sides and return the table's row."""
    seconds = interleaved({name: side.run for name, side in sides.items()}, rounds)
    times = [f"{seconds[name] * 1000:.0f} ms" for name in (THEIRS, OURS)]
    ratio = f"{seconds[THEIRS] / seconds[OURS]:.2f}"
    limit = f"{seconds[THEIRS] / seconds[PRODUCTS]:.2f}" if PRODUCTS in seconds else "-"
    name = str(dtype).removeprefix("torch.")
    errors = [f"{side.error:.1e}" for side in sides.values() if side.error is not None]
    return [label, name, *times, ratio, f"{WANTED[what, dtype]:.1f}", limit, *errors]


def main() -> None:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of A B B A")
    parser.add_argument("--only", choices=("transformer", "VAE", "all"), default="all")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=512, help="of the decoded picture")
    parser.add_argument("--compile", action="store_true", help="add rows with compiled blocks")
    arguments = begin(parser)
    plan = cpu_plan()
    chosen = [field.name for field in fields(plan) if vars(plan)[field.name]]
    print(f"plan: {', '.join(chosen) if plan != PLAIN else 'as torch computes'}", end="\n\n", flush=True)
    rounds = 1 if arguments.quick else arguments.rounds
    grid = QUICK if arguments.quick else next(iter(STACKS["flux"].small.grids.values()))
    size, widths = (64, QUICK_WIDTHS) if arguments.quick else (arguments.size, WIDTHS)
    dtypes = [vars(torch)[name] for name in arguments.dtypes]
    compiled = (False, True) if arguments.compile else (False,)
    if arguments.only != "VAE":
        show(
            row("transformer", dtype, f"FLUX-like{', blocks compiled' * compile}", sides, rounds)
            for dtype in dtypes
            for compile in compiled
            for sides in [transformer_sides(dtype, grid, compile)]
        )
    if arguments.only != "transformer":
        show(
            row("VAE", dtype, f"AutoencoderKL decode {size}x{size}", vae_sides(dtype, size, widths), rounds)
            for dtype in dtypes
        )


def show(rows: Iterable[list[str]]) -> None:
    """Print a table."""
    sides = [THEIRS, OURS]
    header = ["", "dtype", *sides, "times faster", "wanted", "limit", *(f"error of {side}" for side in sides)]
    print_table(header, list(rows))


if __name__ == "__main__":
    main()
