"""Stages over components: their order, their boundaries, and what their calls run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class Encoding(PipelineStage):
    """Work in one piece, which leaves something behind."""

    def forward(self, batch, server_args):
        batch.warnings.append("encoded")
        batch.stage_state = "its own"
        return batch


class Loop(PipelineStage):
    """Two units."""

    def run(self, batch, server_args):
        assert batch.stage_state is None, "the stage before has ended"
        for _ in range(2):
            batch.warnings.append("step")
            yield []


class Stub(ComposedPipeline):
    """Two stages, of which the second has no name of its own."""

    pipeline_name = "Stub"
    _required_config_modules = ("encoder", "transformer")
    _optional_config_modules = ("safety",)

    def create_pipeline_stages(self, server_args):
        self.add_stage(Encoding(), "encoding")
        self.add_stage(Loop())


@pytest.fixture
def pipeline():
    modules: dict[str, Any] = {"encoder": nn.Linear(1, 1), "transformer": nn.Linear(1, 1), "tokenizer": object()}
    nothing: Any = None
    return Stub(Components(modules), nothing, nothing, ServerArgs(device="cpu", conditioning_cache="1kB"))


def req():
    return Req(request_id="r", params=SamplingParams(prompt="x"))


def test_stages_run_in_order_with_a_boundary_before_each(pipeline):
    request, seen = req(), []
    for calls in pipeline.run(request):
        seen.append((request.stage, list(request.warnings), calls))
    assert seen == [
        ("encoding", [], []),
        ("Loop", ["encoded"], []),
        ("Loop", ["encoded", "step"], []),
        ("Loop", ["encoded", "step", "step"], []),
    ]


def test_a_call_names_component_and_method(pipeline):
    pipeline.methods["encoder"] = {"twice": lambda encoder, input, times: encoder(input) * times}
    arguments, key = {"input": torch.ones(1, 1)}, req().key("cond")
    plain = pipeline.forward(ModelCall("encoder", arguments, {}, None, key))
    twice = pipeline.forward(ModelCall("encoder", arguments, {}, None, key, {"times": 2}, "twice"))
    assert torch.equal(plain, pipeline.get_module("encoder")(torch.ones(1, 1))) and torch.equal(twice, plain * 2)


def test_components_by_name(pipeline):
    assert list(pipeline.modules()) == ["encoder", "transformer"]
    assert Stub.component_names() == ("encoder", "transformer", "safety")
    assert [name for name in Stub.component_names() if Stub.is_optional(name)] == ["safety"]


def test_stages_have_the_pipelines_cache(pipeline):
    assert all(stage.cache is pipeline.conditioning_cache for stage in pipeline.stages.values())
    assert pipeline.conditioning_cache.max_bytes == 1000


def test_two_stages_of_one_name_are_our_mistake(pipeline):
    with pytest.raises(AssertionError, match="two stages are named Loop"):
        pipeline.add_stage(Loop())
