"""Plans of components: made from JSON, carried out in one order; layers of fewer bits are put in through one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from safelight import ServerArgs
from safelight.core.executor import SyncExecutor
from safelight.loading.component_plan import plan_components
from safelight.loading.description import configure
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.parallel.mesh import lone_mesh
from safelight.testing.models import requests
from tests.calls import loaded_as
from tests.recipes import all_recipes

FIELDS = {"prompt": "a photo of a cat", "height": 36, "width": 44, "num_inference_steps": 2, "max_sequence_length": 32}


class EightBitLinear(nn.Module):
    """A linear layer whose weights are int8, with a scale a row."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale, requires_grad=False), layer.bias

    def forward(self, hidden_states):
        """Return [..., C_out]."""
        return nn.functional.linear(hidden_states, self.weight * self.scale, self.bias)


def in_eight_bits(module):
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, EightBitLinear(layer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    all_recipes()["FluxPipeline"].build(folder, "default")
    return folder


@pytest.fixture(scope="module")
def plans(folder):
    repository, args = open_repository(folder), ServerArgs(str(folder), device="cpu", kernels="auto")
    return plan_components(repository, repository.pipeline.pipeline_cls(), configure(repository)[0], args, lone_mesh())


def test_plans_are_made_from_json_alone(folder, plans, tmp_path):
    """Without a single weight they are the same; our own classes come first."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    repository, args = open_repository(tmp_path), ServerArgs(str(tmp_path), device="cpu")
    found = plan_components(repository, repository.pipeline.pipeline_cls(), configure(repository)[0], args, lone_mesh())
    assert [plan.name for plan in found] == [plan.name for plan in plans]
    assert plans[0].name == "transformer" and plans[0].source.target.startswith("safelight.")
    assert {plan.dtype for plan in plans} == {torch.float32} and not any(plan.comes_and_goes for plan in plans)
    assert plans[0].empty().proj_out.weight.device.type == "meta"


def test_layers_of_fewer_bits_come_through_the_plan(folder, plans):
    """They are there before kernels are chosen, which leave them alone; pictures are near, and not the same."""
    (plan,) = [plan for plan in plans if plan.name == "transformer"]
    small = dataclasses.replace(plan, treatments=(in_eight_bits,)).load()
    layers = [module for module in small.modules() if isinstance(module, EightBitLinear)]
    assert len(layers) > 10 and not any(type(module) is nn.Linear for module in small.modules())
    pipeline = load_pipeline(ServerArgs(str(folder), device="cpu", conditioning_cache="0"))
    made = []
    for each in (pipeline, loaded_as(pipeline, modules={**pipeline.components.modules, "transformer": small})):
        (req,) = requests(each, FIELDS)
        for _ in SyncExecutor(each).execute(req):
            pass
        made.append(req.outputs[0])
    assert 0 < float((made[0] - made[1]).abs().mean()) < 0.05
