"""`safelight check-model`: a model against Diffusers, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from safelight.cli.options import given, key_value, model_defaults, said, sampling_options, setting_options
from safelight.core.params import SamplingParams
from safelight.core.server_args import ServerArgs
from safelight.loading.repository import open_repository
from safelight.runtime.logs import printable

DEFAULTS: Mapping[str, Any] = {
    "prompt": "an old map of the world, drawn in ink; ships, whales and a compass rose",
    "num_inference_steps": 2,
    "seed": 0,
}
"""Of sampling options that are not given; a check needs no more steps."""
ENGINE_SETTINGS = ("device", "dtype", "attention_backend", "pipeline", "component")
OWN_OPTIONS = [
    click.Argument(["path"]),
    click.Option(["--json", "as_json"], is_flag=True, help="As JSON, with every row."),
    click.Option(["--all", "whole"], is_flag=True, help="Show the rows after the first divergence too."),
    click.Option(
        ["--tolerance"],
        type=click.FloatRange(min=0.0),
        help="Largest difference allowed, in units of the tensor's largest value if that is above 1.  "
        "[default: 1e-4 in float32, 3e-2 in halves]",
    ),
    click.Option(["--prompt"], help=f"What to generate.  [default: {DEFAULTS['prompt']}]"),
]
STEPS = click.Option(
    ["--steps", "--num-inference-steps", "num_inference_steps"],
    type=click.INT,
    help=f"Denoising steps.  [default: {DEFAULTS['num_inference_steps']}]",
)
NOT_OFFERED = frozenset({"n", "fps"})
"""Sampling options that change nothing of one output's tensors."""


class CheckCommand(click.Command):
    """A command that has the options of the model that is its first argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Add the model's options, then parse."""
        params_cls, defaults = SamplingParams, dict(DEFAULTS)
        if args and not args[0].startswith("-"):
            changed = said(args, ("pipeline", "component"))
            repository = open_repository(
                args[0],
                backend="native",
                weights=False,
                pipeline=next(iter(changed["pipeline"]), None),
                component=dict(map(key_value, changed["component"])),
            )
            params_cls = repository.pipeline.sampling_param_cls()
            defaults = {**model_defaults(repository), **DEFAULTS}
        offered = [option for option in sampling_options(params_cls, defaults) if option.name not in NOT_OFFERED]
        sampling = [STEPS if option.name == STEPS.name else option for option in offered]
        engine = [option for option in setting_options(ServerArgs) if option.name in ENGINE_SETTINGS]
        self.params = [*OWN_OPTIONS, *sampling, *engine]
        ctx.obj = params_cls
        return super().parse_args(ctx, args)


@click.command("check-model", cls=CheckCommand)
@click.pass_context
def check_model(
    ctx: click.Context, /, path: str, as_json: bool, whole: bool, tolerance: float | None, **values: Any
) -> int:
    """Run one request through the model at PATH and through Diffusers, and name the first tensor that diverges.

    PATH is a folder or a Hub id, and comes first: the options are the model's own. Both models are loaded, so there
    must be memory for two; a small size is enough. A model that needs a picture is given a random one.

    Compared are token ids, encoders' outputs, image latents, schedule, noise, every model call, those of the first step
    block by block, latents after each step, and pixels; and calls of two requests, stacked, with each alone. The exit
    code is 0 if all agree, and 1 if something diverges.
    """
    from safelight.checking.check import check_model as check

    settings = {name: values[name] for name in ENGINE_SETTINGS if values[name] not in (None, ())}
    settings["component"] = dict(settings.get("component", ()))
    report = check(ServerArgs(path, **settings), asked(ctx.obj, values), tolerance)
    if as_json:
        click.echo(json.dumps(report.json(), indent=2))
    else:
        click.echo(printable(f"{report.table(whole)}\n{report.summary()}", keep="\n"))
    return 0 if report.first is None else 1


def asked(params_cls: type[SamplingParams], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling fields of a check: those given, and defaults for others that the model has."""
    options, fields = params_cls.options(), given(params_cls, values)
    defaults = {name: value for name, value in DEFAULTS.items() if name in options}
    if any(options[name].kind == "numbers" for name in fields):  # a schedule says itself how many steps there are
        defaults.pop(STEPS.name, None)
    return {**defaults, **fields}
