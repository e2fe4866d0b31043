"""`safelight plan`: how a model fits into a device's memory, from its JSON alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from safelight.cli.options import key_value
from safelight.core.byte_sizes import shown_size
from safelight.core.options import listed
from safelight.core.server_args import DTYPES, OFFLOADS, ServerArgs
from safelight.errors import InvalidParameterError

if TYPE_CHECKING:
    from safelight.acceleration.plan import MemoryPlan

WIDTH = 120


def size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT into (width, height)."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise click.BadParameter(f"{text!r} is not of the form WIDTHxHEIGHT, such as 1024x1024")
    return int(sides[0]), int(sides[1])


@click.command()
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--size", "sides", type=size, metavar="WxH", help="Width and height in pixels.  [default: the model's]")
@click.option("--frames", type=click.INT, help="Of a video.  [default: the model's]")
@click.option("--images", type=click.INT, help="Input images, of that size.  [default: as many as the model needs]")
@click.option("--memory-limit", help="Of the device, such as 24GiB.  [default: what is free]")
@click.option("--offload", default="auto", help=f"{listed(OFFLOADS)}.  [default: auto]")
@click.option("--dtype", default="auto", help=f"auto, {listed(DTYPES)}.  [default: auto, which is bfloat16]")
@click.option("--component-dtypes", type=key_value, multiple=True, help="A component's own, as vae=float32.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, in bytes.")
def plan(as_json: bool, sides: tuple[int, int] | None, frames: int | None, images: int | None, **settings: Any) -> None:
    """Print how MODEL fits into a device's memory; loads no weights, and needs none. Without MODEL: the shipped one."""
    settings["component_dtypes"] = dict(settings["component_dtypes"])
    made = _plan(ServerArgs(**settings), sides, frames, images)
    if as_json:
        click.echo(json.dumps(_as_json(made), indent=2))
    else:
        _show(made, Console(width=WIDTH))


def _plan(server_args: ServerArgs, sides: tuple[int, int] | None, frames: int | None, images: int | None) -> MemoryPlan:
    from safelight.loading.footprint import blank_images
    from safelight.loading.planning import device_memory, plan_memory
    from safelight.loading.repository import open_repository

    limit = server_args.memory_limit_bytes()
    if limit is None:
        memory = device_memory(ServerArgs())
        if memory is None:
            raise InvalidParameterError("memory_limit", None, "a size such as 24GiB: there is no device here to ask")
        limit = memory.free()
    fields: dict[str, Any] = {} if sides is None else {"width": sides[0], "height": sides[1]}
    if frames is not None:
        fields["num_frames"] = frames
    if images:
        fields["image"] = blank_images(images, fields.get("height"), fields.get("width"))
    repository = open_repository(server_args.model, server_args.revision, weights=False)
    return plan_memory(repository, server_args, limit, fields)


def _show(made: MemoryPlan, console: Console) -> None:
    from safelight.acceleration.plan import HOST_BANDWIDTH

    components = Table("component", "dtype", "weights", "blocks", "lies", title="components", title_justify="left")
    for name, component in made.footprint.components.items():
        kept = made.resident_blocks.get(name)
        where = "on the host, comes when it is used" if name in made.placed else "on the device"
        blocks = str(len(component.block_bytes) or "")
        components.add_row(
            name,
            ", ".join(component.dtypes),
            shown_size(component.num_bytes),
            blocks if kept is None else f"{blocks}, {kept} stay",
            where,
        )
    headings = ("stage", "runs", "on the device", "weights", "activations", "together")
    stages = Table(*headings, title="stages", title_justify="left")
    for stage in made.stages:
        footprint = stage.footprint
        sizes = [shown_size(number) for number in (stage.weights, footprint.activations, stage.peak)]
        stages.add_row(footprint.stage, footprint.component, ", ".join(stage.resident), *sizes)
    console.print(components)
    console.print(stages)
    for line in made.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if made.bytes_a_step:
        bound = f"at {HOST_BANDWIDTH / 1e9:.0f} GB/s from the host a step takes {made.seconds_a_step:.2f} s or more"
        console.print(bound, highlight=False)


def _as_json(made: MemoryPlan) -> dict[str, Any]:
    return {
        "request": made.footprint.request,
        "memory_limit": made.limit,
        "offload": made.offload,
        "tiled": made.tiled,
        "peak": made.peak,
        "components": {
            name: {
                "bytes": component.num_bytes,
                "dtypes": list(component.dtypes),
                "num_blocks": len(component.block_bytes),
                "resident_blocks": made.resident_blocks.get(name),
                "on_host": name in made.placed,
            }
            for name, component in made.footprint.components.items()
        },
        "stages": [
            {
                "stage": stage.footprint.stage,
                "component": stage.footprint.component,
                "resident": list(stage.resident),
                "weights": stage.weights,
                "activations": stage.footprint.activations,
                "peak": stage.peak,
            }
            for stage in made.stages
        ],
        "bytes_a_request": made.bytes_a_request,
        "bytes_a_step": made.bytes_a_step,
        "seconds_a_step": made.seconds_a_step,
        "host_bytes": made.host_bytes,
        "pinned_bytes": made.pinned,
        "refused": dict(made.refused),
    }
