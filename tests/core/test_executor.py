"""The seam between pipelines and what drives them, on a pipeline of stubs."""

from __future__ import annotations

import pytest
import torch

from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.executor import Execution, SyncExecutor
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


class AddStage(PipelineStage):
    """Work in one piece."""

    def forward(self, batch, server_args):
        batch.latents = torch.zeros(1)
        return batch


class LoopStage(PipelineStage):
    """Three steps of two branches; each adds what the component returned."""

    def run(self, batch, server_args):
        while batch.step_index < 3:
            calls = [
                ModelCall("double", {"x": batch.latents + 1}, {}, (), batch.key(branch, batch.step_index))
                for branch in ("cond", "uncond")
            ]
            self.advance(batch, (yield calls))

    def advance(self, batch, results):
        assert batch.pending == [], "they are made"
        batch.latents = batch.latents + sum(results)
        batch.step_index += 1


class StubPipeline(ComposedPipeline):
    pipeline_name = "StubPipeline"

    def create_pipeline_stages(self, server_args):
        self.add_stage(AddStage(), "add")
        self.add_stage(LoopStage())


def pipeline(double=lambda x: 2 * x):
    return StubPipeline(Components({"double": double}), None, None, ServerArgs(device="cpu"))  # type: ignore[arg-type]


def counting(calls):
    def double(x):
        calls.append(x)
        return 2 * x

    return pipeline(double)


def req(name="r"):
    return Req(request_id=name, params=SamplingParams(prompt="x"))


def test_units_are_boundaries_and_steps():
    calls: list[torch.Tensor] = []
    request = req()
    units = [(request.stage, len(request.pending)) for _ in SyncExecutor(counting(calls)).execute(request)]
    assert units == [("add", 0), ("LoopStage", 0), *[("LoopStage", 2)] * 3]
    assert len(calls) == 6 and request.step_index == 3
    assert request.latents.item() == 124, "each step makes 5 x + 4 of x"
    assert set(request.timings) == {"add", "LoopStage"} and all(seconds >= 0 for seconds in request.timings.values())


def test_an_exception_ends_one_request_and_leaves_the_mode_alone():
    def fail(x):
        raise ValueError("boom")

    broken, healthy = Execution(pipeline(fail), req("a")), Execution(pipeline(), req("b"))
    healthy.advance()
    with pytest.raises(ValueError, match="boom"):
        while broken.advance():
            assert not torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not broken.advance(), "a failed request is over"
    while healthy.advance():
        pass
    assert healthy.req.step_index == 3


def test_closing_the_iterator_stops_the_work():
    calls: list[torch.Tensor] = []
    running = SyncExecutor(counting(calls)).execute(req())
    while not calls:
        next(running)
    running.close()
    assert len(calls) == 2
