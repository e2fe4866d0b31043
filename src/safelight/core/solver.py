"""Solvers of the diffusers package: which of them draw noise as they step, and those that a model takes by name."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from safelight.core.solver_names import CLASSES, SCHEDULES, SPACINGS, all_names, parted

FLOW, EDM, DISCRETE = "flow", "edm", "discrete"
_NOISE: Mapping[str, tuple[str, ...]] = {
    FLOW: ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "invert_sigmas"),
    EDM: ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "prediction_type"),
    DISCRETE: (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        *("rescale_betas_zero_snr", "snr_shift_scale", "sigma_min", "sigma_max", "timestep_type", "variance_type"),
    ),
}
"""By the kind of noise, the settings that say how a model was trained: a solver that lacks one is of other models."""
_USUAL = (None, False, "discrete", "exponential", "fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log")
"""Values of them that need no solver to know the setting."""
_TRIAL_STEPS = 4
MAX_TRAIN_TIMESTEPS = 2000
"""Of a model that takes other solvers: what some do as they are built grows with its square; nearly all have 1,000."""
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What solvers raise of a schedule, or of a model, that they are not for."""

Traits = frozenset[str]
Use = Callable[[Any, Any], Traits | None]
"""Of a model's own solver and another, both with a schedule: which of `SCHEDULES` that has; None if it does not fit."""


@functools.cache
def takes_generator(solver_cls: type) -> bool:
    """Say whether a solver's `step` takes the source of its noise; without one it would draw from torch's own.

    Whether it draws at all is often a matter of its configuration (`stochastic_sampling`, `algorithm_type`).
    """
    return "generator" in parameters(solver_cls.step)  # type: ignore[attr-defined]


def parameters(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function, or of a method of a class."""
    return inspect.signature(method).parameters


@functools.lru_cache(maxsize=64)
def solver_by_name(name: str, own: Any) -> Any:
    """Return the solver of a name, as `built`, which takes a fifth of a second of some: requests have copies of it."""
    return built(name, own)


def built(name: str, own: Any) -> Any:
    """Return the solver of a name, built from the configuration of a model's own.

    Args:
        name: one of `all_names`.
        own: the solver that the model was loaded with.

    Raises:
        ValueError: if it is no solver for this kind of noise.
        ImportError: if it needs a package that is not installed.
        Exception: what the class raises.

    """
    named, suffix = parted(name)
    kind = kind_of(own)
    cls = next((cls for cls in map(_class, named.classes) if kind is not None and _knows(cls, own, kind)), None)
    if cls is None:
        raise ValueError(f"{name} is for models of another kind of noise")
    takes, settings = parameters(cls.__init__), dict(named.settings)
    spacing = {setting: setting == SPACINGS.get(suffix or "") for setting in SPACINGS.values()}
    if kind == FLOW:
        shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
        settings |= {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if suffix is not None:
        if SPACINGS[suffix] not in takes or "use_flow_sigmas" in settings.keys() & takes.keys():
            raise ValueError(f"{cls.__name__} has no other spacing for this kind of noise")
        settings |= spacing
    elif "use_flow_sigmas" in settings.keys() & takes.keys():  # which is a spacing
        settings |= spacing
    config = {key: value for key, value in own.config.items() if key in takes or key.startswith("_")}
    solver = cls.from_config(config, **{key: value for key, value in settings.items() if key in takes})
    # As the class itself keeps what it does not know: pipelines ask for it.
    solver.register_to_config(**{key: value for key, value in own.config.items() if key not in solver.config})
    return solver


def solver_choices(own: Any, *uses: Use) -> list[dict[str, tuple[str, ...]]]:
    """Return the names that a model takes for each of several uses, each name with those of `SCHEDULES` that it has.

    A solver is built from the model's configuration and tried for a few steps: one that cannot, or that would turn
    latents of half precision into others, is none.

    Args:
        own: the solver that the model was loaded with.
        uses: what each loop, which calls it, makes of a solver.

    """
    own = copy.deepcopy(own)
    most = own.config.get("num_train_timesteps", 0)
    if kind_of(own) is None or not (isinstance(most, int) and most <= MAX_TRAIN_TIMESTEPS and tried(own)):
        return [{} for _ in uses]
    found: list[dict[str, tuple[str, ...]]] = [{} for _ in uses]
    for name in all_names():
        try:
            solver = built(name, own)
        except (ImportError, *FAULTS):
            continue
        if tried(solver):
            for taken, use in zip(found, uses, strict=True):
                if (traits := use(own, solver)) is not None:
                    taken[name] = tuple(sorted(traits))
    return found


def kind_of(solver: Any) -> str | None:
    """Return the kind of noise that a solver was configured for; None for one of its own."""
    takes, config = parameters(type(solver).__init__), solver.config
    if config.get("use_flow_sigmas") or ("shift" in takes and "beta_schedule" not in takes):
        return FLOW
    if "sigma_data" in takes:
        return EDM
    return DISCRETE if "beta_schedule" in takes else None


def tried(solver: Any) -> bool:
    """Say whether a solver steps through a short schedule, which it is left with, and keeps the latents' precision."""
    config, generator = solver.config, torch.Generator().manual_seed(0)
    given = {"mu": 1.0} if config.get("use_dynamic_shifting") else {}
    learned = str(config.get("variance_type")).startswith("learned")
    noise = {"generator": generator} if takes_generator(solver.__class__) else {}
    sample = torch.randn(1, 3, 4, 4, generator=generator).to(torch.bfloat16)
    try:
        solver.set_timesteps(_TRIAL_STEPS, device="cpu", **given)
        for t in solver.timesteps:
            scaled = solver.scale_model_input(sample, t) if "scale_model_input" in dir(solver) else sample
            prediction = torch.cat((scaled / 8,) * (1 + learned), 1)
            sample = solver.step(prediction, t, sample, return_dict=False, **noise)[0]
    except FAULTS:
        return False
    return sample.dtype == torch.bfloat16 and bool(torch.isfinite(sample).all())


def schedule_traits(solver: Any, *, gives_sigmas: bool, gives_mu: bool, leaves_flow_sigmas: bool) -> Traits | None:
    """Return which of `SCHEDULES` a solver has where a loop gives it noise levels, or a shift; None if it takes none.

    Args:
        solver: one that was `tried`.
        gives_sigmas: whether the loop spaces the noise levels.
        gives_mu: whether it gives a dynamic shift, whether the solver shifts or not.
        leaves_flow_sigmas: whether it leaves them to a solver with `use_flow_sigmas`.

    """
    spaces_itself = leaves_flow_sigmas and bool(solver.config.get("use_flow_sigmas"))
    taken = frozenset(trait for trait in SCHEDULES if not spaces_itself and _takes(solver, trait))
    lacks = gives_sigmas and not spaces_itself and "sigmas" not in taken
    return None if lacks or (gives_mu and "mu" not in parameters(type(solver).set_timesteps)) else taken


def _takes(solver: Any, trait: str) -> bool:
    """Say whether a schedule may be given, as a list of `trait`."""
    if trait not in parameters(type(solver).set_timesteps):
        return False
    given = {"mu": 1.0} if solver.config.get("use_dynamic_shifting") else {}
    values = {"sigmas": np.asarray((0.9, 0.6, 0.3)), "timesteps": [900, 600, 300]}[trait]
    try:
        copy.deepcopy(solver).set_timesteps(**{trait: values}, device="cpu", **given)
    except FAULTS:
        return False
    return True


def scales_latents(solver: Any) -> bool:
    """Say whether a network is given other latents than the solver steps from; of one that was `tried`."""
    if "scale_model_input" not in dir(solver):
        return False
    one = torch.ones(1)
    return not torch.equal(solver.scale_model_input(one, solver.timesteps[-1]), one)


def scales_noise(solver: Any) -> bool:
    """Say whether a solver begins with other noise than of variance 1; of one that was `tried`."""
    return "init_noise_sigma" in dir(solver) and float(solver.init_noise_sigma) != 1


def _class(class_name: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name)


def _knows(cls: Any, own: Any, kind: str) -> bool:
    """Say whether a class is for a model's kind of noise, and knows everything that is said of it."""
    takes = parameters(cls.__init__)
    of_flow = "use_flow_sigmas" in takes or ("shift" in takes and "beta_schedule" not in takes)
    if not {FLOW: of_flow, EDM: "sigma_data" in takes, DISCRETE: "beta_schedule" in takes}[kind]:
        return False
    if type(own).__name__ not in CLASSES and cls not in own.compatibles:
        return False
    return all(key in takes for key in _NOISE[kind] if own.config.get(key) not in _USUAL)
