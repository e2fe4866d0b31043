"""`safelight serve`: a model behind HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any

import click
import msgspec

from safelight.cli.options import API_KEY_FILE_VARIABLE, engine_options, engine_settings
from safelight.core.server_args import ServerArgs
from safelight.parallel.torchrun import launched
from safelight.runtime.logs import tell
from safelight.serving.serve_args import ServeArgs, read_config

ENVIRONMENT = {"state_dir": "SAFELIGHT_STATE_DIR", "api_key_file": API_KEY_FILE_VARIABLE}
"""Settings that an environment variable names where no flag does."""
CLICK_TYPES = {"int": click.INT, "float": click.FLOAT, "str": click.STRING}


def serve_options() -> list[click.Parameter]:
    """Return an option for each setting of the server."""
    options: list[click.Parameter] = []
    for each in dataclasses.fields(ServeArgs):
        flag, help = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        shown = "" if each.default is None or "[default" in help else f"  [default: {each.default}]"
        details: dict[str, Any] = {"help": f"{help}{shown}", "default": None, "envvar": ENVIRONMENT.get(each.name)}
        if each.type == "bool":
            options.append(click.Option([f"{flag}/--no-{flag[2:]}", each.name], **details))
        else:
            options.append(click.Option([flag, each.name], type=CLICK_TYPES[str(each.type).split(" ")[0]], **details))
    return options


def _settings(values: dict[str, Any], config: Path | None) -> tuple[ServerArgs, ServeArgs]:
    """Return the settings: what a flag says, else what the file says, else the defaults."""
    given = read_config(config) if config else {}
    given |= engine_settings(values)
    names = [each.name for each in dataclasses.fields(ServeArgs)]
    given |= {name: values[name] for name in names if values[name] is not None}
    serve = {name: given.pop(name) for name in names if name in given}
    return ServerArgs(**given), ServeArgs(**serve)


@click.command(params=[])
def serve(model: str | None, config: Path | None, **values: Any) -> None:
    """Serve MODEL over HTTP: a folder or a Hub id; the shipped model if none is named.

    The API is OpenAI's for images and videos, with jobs, progress and cancelling beside it.
    """
    from safelight.serving.server import Server
    from safelight.serving.server import engine_settings as engine_settings_of

    server_args, serve_args = _settings({**values, "model": model}, config)
    place = launched(server_args.num_devices())
    if place is not None and place.rank > 0:
        from safelight.runtime.worker import follow

        start = engine_settings_of(server_args, serve_args).start(None)
        places = {"rank": place.rank, "local_rank": place.local_rank}
        click.get_current_context().exit(follow(msgspec.structs.replace(start, **places)))
    logging.getLogger().setLevel(min(logging.getLogger().level, logging.WARNING))

    async def run() -> int:
        return await Server(server_args, serve_args, lambda line: tell(f"safelight: {line}")).run()

    click.get_current_context().exit(asyncio.run(run()))


serve.params = [
    click.Argument(["model"], required=False),
    click.Option(["--config"], type=click.Path(path_type=Path), help="YAML file of settings, named as these flags."),
    *serve_options(),
    *(option for option in engine_options() if option.name != "model"),
]
