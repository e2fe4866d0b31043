"""Solvers by name, of the package's pipelines: each that a model takes gives Diffusers' bytes, others are refused."""

from __future__ import annotations

import warnings

import diffusers
import numpy as np
import pytest
import torch

from safelight.backends.demands import demands_of
from safelight.core.executor import Execution
from safelight.core.solver import solver_choices
from safelight.core.solver_names import all_names
from safelight.errors import InvalidParameterError, SafelightError
from safelight.preparation import prepare
from safelight.testing.models import load, requests
from tests.backends.conftest import FIELDS
from tests.solver_recipes import HAS_SCIPY, from_recipe, seeded, with_solver

FLOW, BETAS = {"shift": 3.0}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MODELS = {
    "epsilon": ("StableDiffusionPipeline", None),
    "v_prediction": ("StableDiffusionPipeline", diffusers.DDIMScheduler(prediction_type="v_prediction", **BETAS)),
    "zero_snr": (
        "StableDiffusionPipeline",
        diffusers.DDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", **BETAS
        ),
    ),
    "sdxl": ("StableDiffusionXLPipeline", None),
    "sd3": ("StableDiffusion3Pipeline", None),
    "sd3_dynamic": (
        "StableDiffusion3Pipeline",
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
    ),
    "ltx": ("LTXPipeline", None),
    "wan": ("WanVACEPipeline", None),
    "dit": ("DiTPipeline", None),
    "svd": ("StableVideoDiffusionPipeline", None),
}
OF_FLOW = {"sd3", "sd3_dynamic", "ltx", "wan"}
QUICK = {("sd3", "euler_karras"), ("sd3", "unipc"), ("sd3", "heun"), ("sdxl", "dpmpp_2m_sde_karras"), ("sdxl", "heun")}


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory):
    """Return a function that gives a model, and Diffusers' of the same repository."""
    made = {}

    def of(name):
        if name not in made:
            class_name, solver = MODELS[name]
            folder = checkpoint(class_name)
            if solver is not None:
                folder = with_solver(folder, solver, tmp_path_factory.mktemp("solvers") / name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = getattr(diffusers, class_name).from_pretrained(folder)
            theirs.set_progress_bar_config(disable=True)
            made[name] = load(folder), theirs, theirs.scheduler
        return made[name]

    return of


def fields_of(name, **fields):
    own = FIELDS[MODELS[name][0]]
    text = {} if name in ("dit", "svd") else {"prompt": "a cat"}
    return {**text, **own, **fields}


def made_by(pipeline, fields):
    """Return what a request makes, and the steps that it was said to have."""
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    assert req.step_index == req.num_inference_steps
    return req.outputs[0].numpy(), req.num_inference_steps


def reference(pipe, own, name, solver_name, seed, steps):
    """Return Diffusers' output with the solver of the recipe; None where it makes none."""
    generator = torch.Generator().manual_seed(seed)
    pipe.scheduler = seeded(from_recipe(solver_name, own, name in OF_FLOW), generator)
    given = fields_of(name, num_inference_steps=steps)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = np.asarray(pipe(**given, generator=generator, output_type="np")[0][0])
    except Exception:  # whatever it raises of these steps
        return None
    return made if np.isfinite(made).all() else None


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        pytest.param(name, solver, marks=() if (name, solver) in QUICK else pytest.mark.slow)
        for name in MODELS
        for solver in all_names()
    ],
)
def test_every_solver_gives_diffusers_bytes_or_is_refused(models, name, solver):
    ours, theirs, own = models(name)
    if solver not in ours.schema.solvers:
        with pytest.raises(InvalidParameterError, match="scheduler: got") as refused:
            prepare(ours.schema, fields_of(name, scheduler=solver))
        assert "\n" not in str(refused.value)
        assert all(known in str(refused.value) for known in ours.schema.solvers)
        return
    plain, _ = made_by(ours, fields_of(name, seed=3, num_inference_steps=4))
    for seed, steps in ((3, 4), (8, 7), (3, 1)):
        expected = reference(theirs, own, name, solver, seed, steps)
        fields = fields_of(name, scheduler=solver, seed=seed, num_inference_steps=steps)
        if expected is None:
            with pytest.raises(SafelightError):
                made_by(ours, fields)
            assert steps == 1, "schedules of one step alone have none"
            continue
        made, num_calls = made_by(ours, fields)
        assert np.array_equal(made, expected), (solver, seed, steps, np.abs(made - expected).max())
        (req,) = requests(ours, fields)
        assert num_calls == req.params.num_steps()
        if steps == 4 and type(own) is not type(theirs.scheduler):
            assert not np.array_equal(made, plain), "the solver matters"


@pytest.mark.parametrize("name", ["sd3", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_requests_of_different_solvers_interleave(models, name):
    ours, *_ = models(name)
    names = [None, "heun", "euler", *(["dpmpp_2m_sde", "sa_solver", "unipc"] if name == "sdxl" else ["dpmpp_2m_sde"])]
    asked = [fields_of(name, seed=5, **({} if solver is None else {"scheduler": solver})) for solver in names]
    expected = [made_by(ours, fields)[0] for fields in asked]
    assert not np.array_equal(expected[1], expected[2])
    executions = [Execution(ours, requests(ours, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    for execution, wanted in zip(executions, expected, strict=True):
        assert np.array_equal(execution.req.outputs[0].numpy(), wanted)


ACCEPTED = {
    "StableDiffusionXLImg2ImgPipeline": ("add_noise", diffusers.EulerDiscreteScheduler, {"euler_a", "unipc"}, set()),
    "StableDiffusion3Img2ImgPipeline": (
        "scale_noise",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"euler", "heun"},
        {"unipc", "dpmpp_2m"},
    ),
    "FluxPipeline": (
        "mu, and sigmas that it leaves to others",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        {"euler", "unipc", "dpmpp_2m"},
        {"heun", "sa_solver"},
    ),
    "QwenImagePipeline": (
        "sigmas, and a terminal shift",
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        {"euler", "unipc", "lcm"},
        {"heun", "dpmpp_2m", "sa_solver"},
    ),
    "DDPMPipeline": ("neither scaling nor noise of its own", diffusers.DDPMScheduler, {"ddpm"}, {"euler", "unipc"}),
    "DDIMPipeline": ("arguments of its step", diffusers.DDIMScheduler, {"ddim"}, {"ddpm", "euler", "unipc"}),
    "CogVideoXPipeline": ("noise of its own", diffusers.CogVideoXDDIMScheduler, {"ddim"}, {"euler", "ddpm"}),
    "LEditsPPPipelineStableDiffusion": (
        "a class of its own",
        diffusers.DDIMScheduler,
        {"ddim", "dpmpp_2m"},
        {"euler", "heun"},
    ),
    "ConsistencyModelPipeline": ("a kind of its own", diffusers.CMStochasticIterativeScheduler, set(), {"euler"}),
    "StableVideoDiffusionPipeline": (
        "continuous timesteps",
        lambda: diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
        ),
        {"euler", "euler_karras"},
        {"heun", "unipc", "ddim"},
    ),
    "KandinskyV22CombinedPipeline": ("nothing: nested ones do", diffusers.DDPMScheduler, set(), {"ddpm"}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_pipeline_asks_of_its_solver_decides(name):
    _, own, accepted, refused = ACCEPTED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = solver_choices(own(), demands_of(getattr(diffusers, name)).traits)
    assert found.keys() >= accepted and not found.keys() & refused
    assert HAS_SCIPY or not [each for each in found if each.endswith("_beta")]


@pytest.mark.slow
def test_every_pipeline_of_the_package_can_be_read():
    read = 0
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
            read += bool(demands_of(cls).attributes)
    assert read > 200


def test_a_schedule_that_a_solver_does_not_take_is_refused(models):
    ours, *_ = models("sdxl")
    sigmas = [10.0, 3.0, 1.0]
    made, _ = made_by(ours, {**fields_of("sdxl", scheduler="euler"), "sigmas": sigmas, "num_inference_steps": 3})
    plain, _ = made_by(ours, fields_of("sdxl", scheduler="euler", num_inference_steps=3))
    assert not np.array_equal(made, plain)
    with pytest.raises(InvalidParameterError, match=r"sigmas: got .*nothing with scheduler=unipc"):
        prepare(ours.schema, fields_of("sdxl", scheduler="unipc", sigmas=sigmas))
