"""Every plan that some processor is given is exact wherever it can be executed: on the one that runs this, too."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from safelight import ServerArgs
from safelight.acceleration import apply
from safelight.acceleration.cpu import CpuPlan, route_products
from safelight.acceleration.cpu_vae import accelerate_vae
from safelight.core.executor import Execution
from safelight.layers.linear import FeedForward
from safelight.loading.loader import load_pipeline
from safelight.testing.models import TinyModels, requests
from safelight.testing.reference import run_ours, run_reference
from safelight.testing.suites.parity import TOLERANCE
from tests.acceleration.processors import PLANS, PROCESSORS
from tests.acceleration.vaes import picture_vae, relative
from tests.recipes import all_recipes

NEED_ONEDNN = ("onednn_products", "fused_gelu")


def executable(plan: CpuPlan) -> bool:
    """Say whether torch here has what a plan computes by. Which instructions it has is oneDNN's own affair."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn or not any(vars(plan)[name] for name in NEED_ONEDNN)


@pytest.fixture(params=list(PLANS.values()), ids=list(PLANS))
def plan(request):
    if not executable(request.param):
        pytest.skip("torch without oneDNN")
    return request.param


def test_there_is_a_plan_for_each_kind_of_processor():
    assert {"Zen 3", "Zen 4", "Zen 5", "Cascade Lake", "Sapphire Rapids", "Graviton"} <= PROCESSORS.keys()
    assert len(PLANS) >= 6


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_are_no_less_exact(plan, dtype, rows):
    generator, errors = torch.Generator().manual_seed(rows), []
    for _ in range(1 if rows > 16 else 20):  # of few rows one alone shows nothing in half precision
        plain: Any = nn.Sequential(nn.Linear(24, 40), FeedForward(40, 100), FeedForward(40, 64, approximate="none"))
        plain.append(nn.Linear(40, 8, bias=False)).requires_grad_(False).eval()
        for parameter in plain.parameters():
            parameter.normal_(generator=generator).mul_(0.3)
        planned = deepcopy(plain.to(dtype))
        route_products(planned, plan)
        given = torch.randn(rows, 24, generator=generator).to(dtype)
        exact, computed = deepcopy(plain).double()(given.double()), planned(given)
        assert computed.dtype is dtype and torch.equal(planned(given), computed)
        errors.append((relative(computed, exact), relative(plain(given), exact)))
    ours, theirs = (sum(column) / len(column) for column in zip(*errors, strict=True))
    assert ours <= (1e-6 if dtype is torch.float32 else 1.1 * theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_vae_is_no_less_exact(plan, dtype):
    if not plan.channels_last:
        pytest.skip("the plan leaves VAEs alone")
    plain = picture_vae(3).to(dtype)
    planned, exact = deepcopy(plain), deepcopy(plain).double()
    accelerate_vae(planned, plan)
    for call, shape in (
        (lambda vae, x: vae.decode(x).sample, (1, 4, 33, 34)),
        (lambda vae, x: vae.encode(x).latent_dist.mode(), (1, 3, 64, 66)),
    ):
        given = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        reference, computed = call(exact, given.double()), call(planned, given)
        limit = 1e-5 if dtype is torch.float32 else 1.1 * relative(call(plain, given), reference)
        assert relative(computed, reference) <= limit
        assert torch.equal(call(planned, given), computed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    return TinyModels(tmp_path_factory.mktemp("checkpoints"))


OF_EACH_FAMILY = ("FluxPipeline", "QwenImagePipeline", "WanPipeline")


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_pipelines_follow_diffusers(plan, models, monkeypatch, name):
    """Every step and every pixel, as in the suite of parity, which runs under this processor's own plan alone."""
    recipe = all_recipes()[name]
    case = recipe.cases[0]
    monkeypatch.setattr(apply, "cpu_plan", lambda: plan)
    ours = load_pipeline(ServerArgs(str(models.folder(recipe, case.variant)), device="cpu", conditioning_cache="0"))
    reqs = requests(ours, {**case.fields, "n": 1})
    expected = run_reference(models.reference(recipe, case.variant), recipe, reqs)
    _, steps = run_ours(ours, reqs[0])
    for step, wanted in zip(steps, expected.steps, strict=True):
        assert float((step[0] - wanted[0]).abs().max()) <= TOLERANCE
    pixels = torch.as_tensor(expected.pixels[0]).squeeze()
    made = torch.stack([output.squeeze() for output in reqs[0].outputs]).squeeze()
    assert float((made - pixels).abs().max()) <= TOLERANCE
    (again,) = requests(ours, {**case.fields, "n": 1})
    with Execution(ours, again) as execution:
        while execution.advance():
            pass
    assert torch.equal(again.outputs[0], reqs[0].outputs[0])
