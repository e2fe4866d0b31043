"""The seam between pipelines and what drives them, on a pipeline of stubs."""

from __future__ import annotations

import types

import pytest
import torch

from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.executor import Execution, SyncExecutor
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req, map_tensors, move
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
            batch.pending = [
                ModelCall("double", {"x": batch.latents + 1}, {}, (), batch.key(branch, batch.step_index))
                for branch in ("cond", "uncond")
            ]
            self.advance(batch, (yield batch.pending))

    def advance(self, batch, results):
        batch.pending = []
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
    stages = [request.stage for _ in SyncExecutor(counting(calls)).execute(request)]
    assert stages == ["add", "LoopStage", "LoopStage", "LoopStage", "LoopStage"]
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


def test_an_unknown_field_of_a_request_is_an_error():
    request = req()
    with pytest.raises(AttributeError):
        request.something = 1


def test_a_stage_that_returns_another_request_is_our_mistake():
    class Wrong(PipelineStage):
        def forward(self, batch, server_args):
            return req("other")

    with pytest.raises(AssertionError, match="another request"):
        list(Wrong().run(req(), ServerArgs()))


def solver(**attributes):
    return types.SimpleNamespace(**attributes)


def test_move_keeps_what_the_solver_keeps_on_the_host():
    """On an accelerator, what the solver has on the CPU stays there; after a way to the host it is still known."""
    request = req()
    request.timesteps = torch.ones(2, device="meta")
    request.scheduler = solver(
        sigmas=torch.ones(3), timesteps=request.timesteps, model_outputs=[None, request.timesteps]
    )
    host = request.scheduler.sigmas
    move(request, "meta")
    assert request.scheduler.sigmas is host
    assert request.host_tensors == frozenset({"0.sigmas"})
    request.timesteps = torch.ones(2)  # as after a way to the host, which `meta` cannot give
    request.scheduler.timesteps, request.scheduler.model_outputs = request.timesteps, [None, request.timesteps]
    move(request, "meta")
    assert request.scheduler.sigmas.device.type == "cpu"
    assert request.scheduler.timesteps.device.type == "meta"
    assert request.scheduler.model_outputs[1] is request.timesteps is request.scheduler.timesteps


def test_move_leaves_a_solvers_configuration_alone():
    request = req()
    config = {"trained_betas": torch.ones(2)}
    request.scheduler = (solver(_internal_dict=config, step=torch.zeros(1)), solver(step=torch.zeros(1)))
    map_tensors(request, lambda tensor: tensor + 1)
    assert request.scheduler[0]._internal_dict is config and config["trained_betas"].sum() == 2
    assert [each.step.item() for each in request.scheduler] == [1.0, 1.0]
