"""Solvers as Diffusers documents them: `X.from_config(pipe.scheduler.config, ...)`, written down apart from ours."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import shutil
from typing import Any

import diffusers

ODE, SDE, LAST = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}, {"lower_order_final": True}
OF_BETAS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", ODE),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", ODE | LAST),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", SDE | LAST),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "sa_solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OF_FLOW = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
}
SUFFIXES = {"_karras": "use_karras_sigmas", "_exponential": "use_exponential_sigmas", "_beta": "use_beta_sigmas"}
HAS_SCIPY = importlib.util.find_spec("scipy") is not None


def from_recipe(name, own, flow):
    """Return the solver that a user of Diffusers would build of a model's own."""
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    plain, spacing = name.removesuffix(suffix), dict.fromkeys(SUFFIXES.values(), False) if suffix else {}
    if suffix:
        spacing[SUFFIXES[suffix]] = True
    if not flow:
        class_name, settings = OF_BETAS[plain]
    elif plain in OF_FLOW:
        class_name, settings = OF_FLOW[plain], {"shift": own.config.get("shift", own.config.get("flow_shift"))}
    else:
        class_name, settings = OF_BETAS[plain]
        shift = own.config.get("flow_shift", own.config.get("shift"))
        settings = {**settings, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return getattr(diffusers, class_name).from_config(own.config, **settings, **spacing)


def seeded(solver, generator):
    """Let a solver draw from a generator where a pipeline hands it none: Diffusers would draw from torch's own."""
    step = solver.step

    @functools.wraps(step)
    def with_generator(*args, **kwargs):
        if kwargs.get("generator") is None:
            kwargs["generator"] = generator
        return step(*args, **kwargs)

    if "generator" in inspect.signature(step).parameters:
        solver.step = with_generator
    return solver


def with_solver(folder, solver, target):
    """Return a copy of a repository with another solver."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "scheduler")
    solver.save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", type(solver).__name__]}))
    return target
