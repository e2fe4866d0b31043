"""`safelight generate`: its options are those of the model that it is asked to run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from safelight import media, video
from safelight.cli.options import engine_options, engine_settings, given, sampling_options
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, OutputError
from safelight.loading.repository import Repository, open_repository
from safelight.preparation import prepare

if TYPE_CHECKING:
    from safelight.results import GenerationEvent

GENERATE_OPTIONS = [
    click.Argument(["prompt"], required=False),
    click.Option(
        ["-o", "--output"],
        type=click.Path(path_type=Path),
        help="Where to: a .png, .jpg or .webp file; for a video .mp4, .webp, or a folder for PNGs.",
    ),
    click.Option(["--overwrite"], is_flag=True, help="Replace files that exist."),
]


class GenerateCommand(click.Command):
    """A command that has the options of the model named by `--model`, read from its index before parsing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Add the model's options, then parse."""
        values: dict[str, str | None] = {"model": None, "revision": None, "backend": None}
        for index, argument in enumerate(args):
            name, separator, value = argument.partition("=")
            if name.removeprefix("--") in values and name.startswith("--"):
                values[name.removeprefix("--")] = value if separator else next(iter(args[index + 1 :]), None)
        repository = open_repository(
            values["model"], values["revision"], backend=values["backend"] or "auto", weights=False
        )
        sampling = sampling_options(repository.params_cls(), default_values(repository))
        self.params = [*GENERATE_OPTIONS, *sampling, *engine_options()]
        ctx.obj = repository
        return super().parse_args(ctx, args)


@click.command(cls=GenerateCommand)
@click.pass_context
def generate(ctx: click.Context, /, prompt: str | None, output: Path | None, overwrite: bool, **values: Any) -> None:
    """Make pictures of PROMPT, with the shipped model or the one named by --model.

    The options are the model's own: add --model before --help to see another's. The files that were made are named
    on standard output, one a line; everything else goes to standard error.
    """
    repository: Repository = ctx.obj
    fields = {"output_type": "pil", **given(repository.params_cls(), values)}
    if prompt is not None:
        fields["prompt"] = prompt
    elif "prompt" not in default_values(repository):
        raise InvalidParameterError("prompt", None, 'the text to generate from: safelight generate "..."')
    console = Console(stderr=True)
    begun = time.perf_counter()
    event = _run(console, repository, engine_settings(values), fields, partial(check_files, output, overwrite))
    result = event.result
    assert result is not None
    ending = ".mp4" if result.videos else ".png"
    path = output or free_path(Path(f"safelight-{result.seeds[0]}{ending}"), len(result.images) or len(result.videos))
    for made in result.save(path, overwrite):
        click.echo(os.fsencode(made))
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    seeds, seconds = ", ".join(map(str, result.seeds)), time.perf_counter() - begun
    console.print(f"seed {seeds}, {event.num_inference_steps} steps, {seconds:.1f} s", style="dim", highlight=False)


def default_values(repository: Repository) -> dict[str, Any]:
    """Return what unset fields take: the family's values, with the repository's own over them."""
    return {**repository.params_cls().defaults, **repository.sampling_defaults()}


def check_files(output: Path | None, overwrite: bool, schema: ModelSchema, params: SamplingParams) -> None:
    """Refuse a name under which not every file could be written.

    Args:
        output: the name; None if a free one is to be found.
        overwrite: whether files that exist are replaced.
        schema: of the model.
        params: resolved, of all outputs.

    Raises:
        OutputError: naming the path and what it takes.

    """
    if output is None:
        return
    for path in media.output_paths(output, len(params.split()) * params.num_pictures()):
        if schema.task.makes_video:
            video.check_output(path, overwrite)
        else:
            media.check_output(path, overwrite, params.makes_alpha)


def _run(
    console: Console,
    repository: Repository,
    settings: dict[str, Any],
    fields: dict[str, Any],
    check: Callable[[ModelSchema, SamplingParams], None],
) -> GenerationEvent:
    """Load the model and make the pictures, with a progress bar where somebody watches; return the last event.

    What is wrong with the request, and what `check` refuses, is said before the weights are loaded.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        from safelight.generator import DiffusionGenerator
        from safelight.loading.loader import describe

        schema = describe(repository)
        check(schema, prepare(schema, fields)[0])
        with DiffusionGenerator.from_pretrained(**settings) as generator:
            for event in generator.stream(**fields):
                number = f" {event.output_index + 1}/{event.num_outputs}" if event.num_outputs > 1 else ""
                total = event.num_inference_steps or None
                progress.update(
                    task, description=f"{event.stage.replace('_', ' ')}{number}", completed=event.step, total=total
                )
    return event


def free_path(path: Path, count: int) -> Path:
    """Return the path, or the first of `name-a`, `name-b`, ... whose files do not exist yet."""
    for suffix in ("", *(f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")):
        candidate = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        if not any(target.exists() for target in media.output_paths(candidate, count)):
            return candidate
    raise OutputError(f"output: every name from {path} on is taken; name one with -o")
