"""Solvers by the names that users know: classes of the diffusers package, and settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Attributes:
        classes: of the diffusers package, one for each kind of noise; the first that fits a model's own is built.
        settings: over the model's own, where the class knows them.
        calls_a_step: of the network, in each step but the last.
        more_calls: beside them, where there are two steps and more.

    """

    classes: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    calls_a_step: int = 1
    more_calls: int = 0


_MULTISTEP, _SINGLESTEP = (
    ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    "DPMSolverSinglestepScheduler",
)
_ODE, _SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
_LOWER_LAST = {"lower_order_final": True}
"""What the class sets itself, with a warning, where the last noise level is zero."""

SOLVERS: Mapping[str, Named] = {
    "ddim": Named(("DDIMScheduler", "CogVideoXDDIMScheduler")),
    "ddpm": Named(("DDPMScheduler",)),
    "deis": Named(("DEISMultistepScheduler",), {"algorithm_type": "deis"}),
    "dpmpp_2m": Named(_MULTISTEP, _ODE),
    "dpmpp_2m_sde": Named(_MULTISTEP, _SDE),
    "dpmpp_2s": Named((_SINGLESTEP,), _ODE | _LOWER_LAST),
    "dpmpp_sde": Named((_SINGLESTEP,), _SDE | _LOWER_LAST),
    "euler": Named(("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")),
    "euler_a": Named(("EulerAncestralDiscreteScheduler",)),
    "heun": Named(("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), calls_a_step=2),
    "kdpm2": Named(("KDPM2DiscreteScheduler",), calls_a_step=2),
    "kdpm2_a": Named(("KDPM2AncestralDiscreteScheduler",), calls_a_step=2),
    "lcm": Named(("LCMScheduler", "FlowMatchLCMScheduler")),
    "lms": Named(("LMSDiscreteScheduler",)),
    "pndm": Named(("PNDMScheduler",), {"skip_prk_steps": True}, more_calls=1),  # as Stable Diffusion has it
    "sa_solver": Named(("SASolverScheduler",), {"algorithm_type": "data_prediction"}),
    "tcd": Named(("TCDScheduler",)),
    "unipc": Named(("UniPCMultistepScheduler",)),
}
"""The names and pairings are those of Diffusers' own table of solvers ("Schedulers", overview)."""
SPACINGS: Mapping[str, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
"""Suffixes of a name, and the setting that each turns on: how the noise levels are spaced."""
SCHEDULES = frozenset({"sigmas", "timesteps"})
"""Lists of steps that some solvers take, and some models' parameters of the same names hand to them."""
CLASSES = frozenset(class_name for named in SOLVERS.values() for class_name in named.classes)


def all_names() -> tuple[str, ...]:
    """Return every name, with every suffix."""
    return tuple(name for plain in SOLVERS for name in (plain, *(f"{plain}_{suffix}" for suffix in SPACINGS)))


def parted(name: str) -> tuple[Named, str | None]:
    """Return what a name stands for, and its suffix.

    Raises:
        KeyError: for none of `all_names`.

    """
    plain, _, suffix = name.rpartition("_")
    return (SOLVERS[plain], suffix) if suffix in SPACINGS else (SOLVERS[name], None)


def num_calls(name: str | None, num_steps: int) -> int:
    """Return how often a solver of a name, or a model's own, calls the network in so many steps."""
    if name is None or num_steps < 2:
        return num_steps
    named, _ = parted(name)
    return named.calls_a_step * (num_steps - 1) + 1 + named.more_calls
