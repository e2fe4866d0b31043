"""Which solvers draw noise as they step, and which a model takes by name."""

from __future__ import annotations

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from safelight.core.solver import MAX_TRAIN_TIMESTEPS, solver_by_name, solver_choices, takes_generator
from tests.solver_recipes import HAS_SCIPY


@pytest.mark.parametrize(
    ("solver", "takes"),
    [
        (FlowMatchEulerDiscreteScheduler, True),
        (DDIMScheduler, True),
        (EulerDiscreteScheduler, True),
        (UniPCMultistepScheduler, False),
    ],
)
def test_the_source_of_noise_is_given_where_it_is_taken(solver, takes):
    assert takes_generator(solver) is takes


def any_use(own, solver):
    return frozenset()


KINDS = {
    "betas": (
        diffusers.PNDMScheduler(skip_prk_steps=True),
        {"ddim", "heun", "unipc_karras", "lcm"},
        {"euler_a_karras"},
    ),
    "zero terminal": (DDIMScheduler(rescale_betas_zero_snr=True), {"ddim", "euler"}, {"heun", "lms", "sa_solver"}),
    "edm": (diffusers.EDMDPMSolverMultistepScheduler(), {"euler", "dpmpp_2m"}, {"unipc", "ddim"}),
    "flow": (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        {"euler_karras", "heun", "sa_solver"},
        {"unipc_karras", "ddim"},
    ),
    "dynamic": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"unipc", "lcm"}, {"heun", "sa_solver"}),
    "terminal": (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), {"euler", "unipc"}, {"heun", "dpmpp_2m"}),
    "learned": (diffusers.DDPMScheduler(variance_type="learned_range"), {"ddpm", "dpmpp_2m"}, {"euler", "ddim"}),
    "other noise": (diffusers.IPNDMScheduler(), set(), {"euler"}),
    "long": (EulerDiscreteScheduler(num_train_timesteps=MAX_TRAIN_TIMESTEPS + 1), set(), {"euler"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_was_trained_with_decides(kind):
    own, accepted, refused = KINDS[kind]
    before = dict(vars(own))
    (found,) = solver_choices(own, any_use)
    assert found.keys() >= accepted and not found.keys() & refused
    assert HAS_SCIPY or not [name for name in found if name.endswith("_beta") or name == "lms"]
    state = vars(own)
    assert state.keys() == before.keys() and all(state[name] is value for name, value in before.items()), "a copy"


def test_a_solver_has_the_models_noise_and_the_names_settings():
    own = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    euler, multistep = solver_by_name("euler", own), solver_by_name("dpmpp_2m_sde", own)
    assert euler.config.shift == 5.0 and multistep.config.flow_shift == 5.0 and multistep.config.use_flow_sigmas
    assert multistep.config.algorithm_type == "sde-dpmsolver++"
    betas = EulerDiscreteScheduler(beta_start=0.001, use_karras_sigmas=True)
    assert solver_by_name("unipc", betas).config.use_karras_sigmas
    spaced = solver_by_name("unipc_exponential", betas)
    assert spaced.config.use_exponential_sigmas and not spaced.config.use_karras_sigmas
    assert spaced.config.beta_start == 0.001
    assert solver_by_name("euler", own) is euler, "built once"


def test_what_a_repository_says_to_others_breaks_none():
    """Settings that its own solver does not know, and another would."""
    own = EulerDiscreteScheduler()
    own.register_to_config(lambda_min_clipped="x", solver_order="x", original_inference_steps={})
    assert "heun" in solver_choices(own, any_use)[0]
