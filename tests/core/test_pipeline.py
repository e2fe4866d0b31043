"""Stages over components: their order, their boundaries, and what the next unit needs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class Encoding(PipelineStage):
    """Work with a module of its own."""

    def __init__(self, encoder):
        self.encoder = encoder

    def needed_modules(self, batch):
        return (self.encoder,)

    def forward(self, batch, server_args):
        batch.warnings.append("encoded")
        return batch


class Loop(PipelineStage):
    """Two units."""

    def run(self, batch, server_args):
        for _ in range(2):
            batch.warnings.append("step")
            yield []


class Stub(ComposedPipeline):
    """Two stages, of which the second has no name of its own."""

    pipeline_name = "Stub"
    _required_config_modules = ("encoder", "transformer")
    _optional_config_modules = ("safety",)

    def create_pipeline_stages(self, server_args):
        self.add_stage(Encoding(self.get_module("encoder")), "encoding")
        self.add_stage(Loop())


@pytest.fixture
def pipeline():
    modules: dict[str, Any] = {"encoder": nn.Linear(1, 1), "transformer": nn.Linear(1, 1), "tokenizer": object()}
    nothing: Any = None
    return Stub(modules, nothing, nothing, ServerArgs(device="cpu", conditioning_cache="1kB"))


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


def test_the_next_unit_needs_what_its_stage_runs(pipeline):
    request = req()
    assert pipeline.needed_components(request) == ()
    running = pipeline.run(request)
    next(running)
    assert pipeline.needed_components(request) == ("encoder",)
    next(running)
    assert pipeline.needed_components(request) == ()


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
