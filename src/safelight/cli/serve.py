"""`safelight serve`: a model behind HTTP."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import click

from safelight.cli.config_file import read_config
from safelight.cli.options import API_KEY_FILE_VARIABLE, given_settings, setting_options
from safelight.core.options import options_of
from safelight.core.server_args import ServerArgs
from safelight.parallel.torchrun import launched
from safelight.runtime.logs import tell
from safelight.serving.http_args import HTTPArgs

ENVIRONMENT = {"state_dir": "SAFELIGHT_STATE_DIR", "api_key_file": API_KEY_FILE_VARIABLE}
"""Settings that an environment variable names where no flag does."""


def _settings(values: dict[str, Any], config: Path | None) -> tuple[ServerArgs, HTTPArgs]:
    """Return the settings: what a flag says, else what the file says, else the defaults."""
    given = read_config(config) if config else {}
    given |= given_settings(ServerArgs, values) | given_settings(HTTPArgs, values)
    http = {name: given.pop(name) for name in options_of(HTTPArgs) if name in given}
    return ServerArgs(**given), HTTPArgs(**http)


@click.command(params=[])
def serve(model: str | None, config: Path | None, **values: Any) -> None:
    """Serve MODEL over HTTP: a folder or a Hub id; the shipped model if none is named.

    The API is OpenAI's for images and videos, with jobs, progress and cancelling beside it.
    """
    from safelight.serving.server import Server, engine_settings

    server_args, http_args = _settings({**values, "model": model}, config)
    place = launched(server_args.num_devices())
    if place is not None and place.rank > 0:
        from safelight.runtime.messages import Start
        from safelight.runtime.worker.gpu_worker import follow

        start = Start(engine_settings(server_args, http_args), place.rank, place.local_rank)
        click.get_current_context().exit(follow(start))
    logging.getLogger().setLevel(min(logging.getLogger().level, logging.WARNING))

    async def run() -> int:
        return await Server(server_args, http_args, lambda line: tell(f"safelight: {line}")).run()

    click.get_current_context().exit(asyncio.run(run()))


serve.params = [
    click.Argument(["model"], required=False),
    click.Option(["--config"], type=click.Path(path_type=Path), help="YAML file of settings, named as these flags."),
    *setting_options(HTTPArgs, ENVIRONMENT),
    *(option for option in setting_options(ServerArgs) if option.name != "model"),
]
