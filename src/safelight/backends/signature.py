"""Sampling parameters made from the signature of a Diffusers pipeline's `__call__`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from safelight.backends.annotations import EMPTY, Askable, UnaskableError, askable, default_of, parameters_of
from safelight.backends.outputs import SOUND, VIDEO, made_by
from safelight.core.options import MEDIA_KINDS, Option
from safelight.core.package_params import FRAME_RATE, PackageParams, make_params_cls
from safelight.core.params import DEFAULT_FPS, SamplingParams
from safelight.core.tasks import Task
from safelight.errors import ModelIndexError

OURS = frozenset({"seed", "n", "scheduler", "output_type"})
"""Common fields that every pipeline has here: each is called with a generator, once an output, for arrays; which
solvers it takes is in its schema."""
NEEDED = ("generator", "output_type")
"""What a pipeline's call must take to be run here."""
REFUSED = {"batch_size": "use n", "callback": "use stream(), which yields after every step"}
"""Arguments of older pipelines that are done otherwise here, and how."""
NO_ADAPTER = "no IP adapter is ever loaded"


def params_from_signature(call: Callable[..., Any], name: str) -> type[PackageParams]:
    """Return a dataclass of what may be asked of a pipeline, named after it.

    Args:
        call: its `__call__`.
        name: of the pipeline.

    Raises:
        ModelIndexError: for a pipeline that cannot be called with what can be asked for, or makes no media.

    """
    given = arguments_of(call)
    known, unknown = sorted_arguments(call)
    required = {key for key, value in given.items() if value.default is EMPTY}
    check_callable(name, given.keys(), required - known.keys(), unknown)
    makes = made_by(call, name)
    common = SamplingParams.options()
    own = {key: each.option for key, each in known.items() if key not in SamplingParams.aliases}
    own = {key: _named(option, key, name, common) for key, option in own.items()}
    own = {key: option for key, option in own.items() if option != common.get(key)}
    invented = {"fps"} if makes == VIDEO else set()
    kept = common.keys() & known.keys() | OURS | invented
    defaults = {key: default_of(given[key], known[key].option) for key in known.keys() & {*own, *kept} - OURS}
    if invented - given.keys() and FRAME_RATE not in given:
        defaults["fps"] = DEFAULT_FPS
    shared = {key: value for key, value in SamplingParams.defaults.items() if key in OURS}
    refused = {key: value for key, value in unknown.items() if key not in SamplingParams.refused}
    made = make_params_cls(
        f"{name.removesuffix('Pipeline')}SamplingParams",
        {**own, **_output_type(call, makes)},
        defaults={**shared, **{key: value for key, value in defaults.items() if value is not None}},
        excluded=common.keys() - kept,
        refused={**refused, **SamplingParams.refused, **REFUSED},
        tasks=(),
    )
    inputs = tuple(key for key, option in made.options().items() if option.kind in MEDIA_KINDS)
    made.tasks = (Task(name, inputs, tuple(sorted(required)), tuple(made.options()), made.defaults),)
    made.needs_prompt = "prompt" in required
    return made


def arguments_of(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return what a call may be given by name."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {key: value for key, value in parameters_of(call).items() if key != "self" and value.kind not in variable}


def sorted_arguments(call: Callable[..., Any]) -> tuple[dict[str, Askable], dict[str, str]]:
    """Return those that can be asked for, and of the others why they cannot."""
    given = arguments_of(call)
    known: dict[str, Askable] = {}
    unknown: dict[str, str] = {}
    for key, parameter in given.items():
        if key in REFUSED or key in SamplingParams.refused or key in ("output_type", "seed"):
            continue
        if key == "prompt":  # whatever else it may be
            known[key] = Askable(SamplingParams.options()[key])
        elif "ip_adapter" in key:
            unknown[key] = NO_ADAPTER
        else:
            try:
                known[key] = askable(key, parameter, call, given)
            except UnaskableError as reason:
                unknown[key] = str(reason)
    return known, unknown


def _named(option: Option, key: str, name: str, common: Mapping[str, Option]) -> Option:
    """Return a parameter's option with its help; the common one, with its bounds, where it is of the same kind."""
    shared = common.get(key)
    if shared is not None and (shared.kind == option.kind or key == "prompt"):
        return shared
    if shared is not None:
        low, high = shared.minimum, shared.maximum
        return dataclasses.replace(
            option, help=shared.help, group=shared.group, minimum=low, maximum=high, nullable=False
        )
    return dataclasses.replace(option, help=f"{key} of {name}")


def check_callable(name: str, given: Collection[str], missing: Collection[str], why: Mapping[str, str]) -> None:
    """Refuse a pipeline that takes no generator, say, or that needs what cannot be asked for."""
    lacking = [key for key in NEEDED if key not in given]
    if lacking or missing:
        needs = f"its call takes no {' and no '.join(lacking)}" if lacking else ""
        unknown = ", ".join(f"{key} ({why.get(key, 'a tensor')})" for key in sorted(missing))
        needs = needs or f"it needs {unknown}, which cannot be asked for here"
        raise ModelIndexError(f"model_index.json: pipeline class {name!r} cannot be run: {needs}")


def _output_type(call: Callable[..., Any], makes: str) -> dict[str, Option]:
    """Return the option for the form of the result, where it is not the common one: a call that knows no latents.

    Such a call would return pixels for latents: whether it asks for the word is seen in its code.
    """
    if "latent" in inspect.unwrap(call).__code__.co_consts and makes != SOUND:
        return {}
    common = SamplingParams.options()["output_type"]
    forms = tuple(form for form in common.choices if form != "latent")
    return {"output_type": dataclasses.replace(common, choices=forms)}
