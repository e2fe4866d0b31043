"""`safelight generate`: its options are those of the model that it is asked to run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from safelight import media, video
from safelight.cli.options import (
    API_KEY_FILE_VARIABLE,
    given,
    given_settings,
    key_value,
    model_defaults,
    said,
    sampling_options,
    setting_options,
)
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, OutputError
from safelight.loading.repository import Repository, open_repository
from safelight.preparation import prepare
from safelight.runtime.logs import printable

if TYPE_CHECKING:
    from safelight.client import RemoteEngine
    from safelight.generator import DiffusionGenerator
    from safelight.results import GenerationEvent

GENERATE_OPTIONS = [
    click.Argument(["prompt"], required=False),
    click.Option(
        ["-o", "--output"],
        type=click.Path(path_type=Path),
        help="Where to: a .png, .jpg or .webp file; for a video .mp4, .webp, or a folder for PNGs; for a sound .wav.",
    ),
    click.Option(["--overwrite"], is_flag=True, help="Replace files that exist."),
    click.Option(["--server"], metavar="URL", help="Let a server's model do it; --model and the like are its matter."),
    click.Option(
        ["--api-key-file"], type=click.Path(path_type=Path), envvar=API_KEY_FILE_VARIABLE, help="The server's key."
    ),
]


@dataclass(frozen=True)
class Source:
    """Where pictures come from: a model here, or a server's.

    Attributes:
        params_cls: what may be asked.
        defaults: what unset fields take.
        schema: returns what the model takes.
        open: loads the model with these settings, or connects to it.

    """

    params_cls: type[SamplingParams]
    defaults: Mapping[str, Any]
    schema: Callable[[], ModelSchema]
    open: Callable[[dict[str, Any]], DiffusionGenerator]


def local_model(repository: Repository) -> Source:
    """Return a model of this machine, which its index describes."""

    def schema() -> ModelSchema:
        from safelight.loading.loader import describe

        return describe(repository)

    def load(settings: dict[str, Any]) -> DiffusionGenerator:
        from safelight.generator import DiffusionGenerator

        return DiffusionGenerator.from_pretrained(**settings)

    return Source(repository.pipeline.sampling_param_cls(), model_defaults(repository), schema, load)


def served_model(engine: RemoteEngine) -> Source:
    """Return a server's model, which the server describes; the engine's settings are the server's own."""

    def connect(settings: dict[str, Any]) -> DiffusionGenerator:
        from safelight.generator import DiffusionGenerator

        for name in settings:
            raise InvalidParameterError(name, settings[name], "nothing here: with --server, the server has its own")
        return DiffusionGenerator(engine)

    return Source(engine.schema.params_cls, engine.schema.defaults, lambda: engine.schema, connect)


class GenerateCommand(click.Command):
    """A command that has the options of the model named by `--model`, read from its index before parsing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Add the model's options, then parse."""
        names = ("model", "revision", "backend", "pipeline", "component", "server", "api-key-file")
        ctx.obj = source = _source(ctx, said(args, names))
        sampling = sampling_options(source.params_cls, source.defaults)
        self.params = [*GENERATE_OPTIONS, *sampling, *setting_options(ServerArgs)]
        return super().parse_args(ctx, args)


@click.command(cls=GenerateCommand)
@click.pass_context
def generate(ctx: click.Context, /, prompt: str | None, output: Path | None, overwrite: bool, **values: Any) -> None:
    """Make pictures of PROMPT, with the shipped model, the one named by --model, or that of a --server.

    The options are the model's own: add --model before --help to see another's. The files that were made are named
    on standard output, one a line; everything else goes to standard error.
    """
    source: Source = ctx.obj
    fields = {"output_type": "pil", **given(source.params_cls, values)}
    if prompt is not None:
        fields["prompt"] = prompt
    elif source.params_cls.needs_prompt and "prompt" in source.params_cls.options() and "prompt" not in source.defaults:
        raise InvalidParameterError("prompt", None, 'the text to generate from: safelight generate "..."')
    console = Console(stderr=True)
    begun = time.perf_counter()
    event = _run(console, source, given_settings(ServerArgs, values), fields, partial(check_files, output, overwrite))
    result = event.result
    assert result is not None
    path = output or free_path(source.schema(), result.seeds[0], result.num_files)
    for made in result.save(path, overwrite):
        click.echo(os.fsencode(made))
    for warning in result.warnings:
        console.print(f"warning: {printable(warning)}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    seeds, seconds = ", ".join(map(str, result.seeds)), time.perf_counter() - begun
    console.print(f"seed {seeds}, {event.num_inference_steps} steps, {seconds:.1f} s", style="dim", highlight=False)


def _source(ctx: click.Context, given: Mapping[str, list[str]]) -> Source:
    """Return what the arguments name; a connection is closed when the command ends, however it does."""
    values = {name: texts[-1] if texts else None for name, texts in given.items()}
    if values["server"] is None:
        repository = open_repository(
            values["model"],
            values["revision"],
            backend=values["backend"] or "auto",
            weights=False,
            pipeline=values["pipeline"],
            component=dict(map(key_value, given["component"])),
        )
        return local_model(repository)
    from safelight.client import RemoteEngine
    from safelight.serving.principals import read_key

    key_file = values["api-key-file"] or os.environ.get(API_KEY_FILE_VARIABLE)
    engine = RemoteEngine(values["server"], read_key(key_file) if key_file else None)
    ctx.call_on_close(engine.close)
    return served_model(engine)


def check_files(output: Path | None, overwrite: bool, schema: ModelSchema, params: SamplingParams) -> None:
    """Refuse a name, or a folder if no name was given, under which not every file could be written.

    Args:
        output: the name; None if a free one is to be found.
        overwrite: whether files that exist are replaced.
        schema: of the model.
        params: resolved, of all outputs.

    Raises:
        OutputError: naming the path and what it takes.

    """
    assert params.seed is not None
    count = len(params.split()) * params.num_pictures()
    for path in media.output_paths(output or free_path(schema, params.seed, count), count):
        if schema.task.makes_video:
            video.check_output(path, overwrite)
        elif schema.task.lasts:
            video.check_sound_output(path, overwrite)
        else:
            media.check_output(path, overwrite, params.makes_alpha)


def _run(
    console: Console,
    source: Source,
    settings: dict[str, Any],
    fields: dict[str, Any],
    check: Callable[[ModelSchema, SamplingParams], None],
) -> GenerationEvent:
    """Load the model and make the pictures, with a progress bar where somebody watches; return the last event.

    What is wrong with the request, and what `check` refuses, is said before the weights are loaded. A seed that nobody
    chose is drawn there too: it is in the files' name.
    """
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        schema = source.schema()
        params = prepare(schema, fields)[0]
        check(schema, params)
        with source.open(settings) as generator:
            for event in generator.stream(**{**fields, "seed": params.seed}):
                number = f" {event.output_index + 1}/{event.num_outputs}" if event.num_outputs > 1 else ""
                what, total = f"{event.stage.replace('_', ' ')}{number}", event.num_inference_steps or None
                progress.update(task, description=what, completed=event.step, total=total)
    return event


def free_path(schema: ModelSchema, seed: int, count: int) -> Path:
    """Return a name here of the seed, or the first of `name-a`, `name-b`, ... whose files do not exist yet."""
    ending = ".mp4" if schema.task.makes_video else ".wav" if schema.task.lasts else ".png"
    path = Path(f"safelight-{seed}{ending}")
    for suffix in ("", *(f"-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")):
        candidate = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        if not any(target.exists() for target in media.output_paths(candidate, count)):
            return candidate
    raise OutputError(f"output: every name from {path} on is taken; name one with -o")
