"""The way of a model call: what is tried here, each in a few lines, is what the list of wrappers is for."""

from __future__ import annotations

import socket
import struct
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load, save

from safelight import ServerArgs
from safelight.core.calls import ModelCall
from safelight.core.executor import Execution
from safelight.core.model_runner import ModelRunner, resident
from safelight.core.request import map_tensors
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.runtime.worker.stacking import Stacking
from safelight.testing.models import requests
from tests.calls import one_by_one
from tests.recipes import all_recipes

GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.0, "num_inference_steps": 4, "n": 2, "seed": 5}
SIZE = {"height": 36, "width": 44, "max_sequence_length": 32}
ASKED = ({"prompt": "a photo of a cat", **GUIDED, **SIZE}, {"prompt": "an old map", **GUIDED, **SIZE, "seed": 9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    all_recipes()["FluxPipeline"].build(folder, "default")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(ServerArgs(str(folder), device="cpu", conditioning_cache="0"))


def reqs_of(pipeline, asked=ASKED):
    """Return the outputs of each request; those of one have its id in common."""
    made = []
    for number, fields in enumerate(asked):
        for index, req in enumerate(requests(pipeline, fields)):
            req.request_id, req.output_index = f"r{number}", index
            made.append(req)
    return made


def alone(pipeline, runner, req, between=lambda req: None):
    with Execution(pipeline, req, runner) as execution:
        while execution.advance():
            between(req)
    return req.outputs[0]


def every_other_step(forwards, make):
    """A step cache: each second step of an output's branch is answered by the step before."""
    fresh = [each for each in forwards if each.call.signature is None or each.call.key.step % 2 == 0]
    made = iter(make(fresh))
    results = []
    for each in forwards:
        (req,), slot = each.reqs, ("every other step", each.call.key.branch)
        result = next(made) if each in fresh else req.stage_state.kept[slot]
        if each.call.signature is not None:
            req.stage_state.kept[slot] = result
        results.append(result)
    return results


def counting(calls):
    return one_by_one(lambda forward, make: (calls.append(forward.call), make(forward))[1])


def test_a_step_cache_keeps_a_value_per_output_and_branch(pipeline):
    """Outputs of one request, and other requests, are interleaved and moved: each has what it would have alone."""
    calls: list[ModelCall] = []
    runner = ModelRunner(pipeline, [every_other_step, counting(calls)])
    plain = [alone(pipeline, None, req) for req in reqs_of(pipeline)]
    expected = [alone(pipeline, runner, req) for req in reqs_of(pipeline)]
    assert not any(map(torch.equal, plain, expected)), "the cache answers other steps' values"
    assert sum(call.component == "transformer" for call in calls) == 4 * 2 * 2, "outputs x branches x half the steps"

    def poisoned(tensor):
        clone = tensor.clone()
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        return clone

    executions = [Execution(pipeline, req, runner) for req in reqs_of(pipeline)]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
        with torch.inference_mode():
            for execution in running:
                map_tensors(execution.req, poisoned)
    assert all(map(torch.equal, [each.req.outputs[0] for each in executions], expected))
    assert all(execution.req.stage_state is None for execution in executions)


def test_rows_that_decide_differently_run_apart(pipeline):
    """Before the calls are stacked: a request that is a step ahead is answered while the other's rows run."""
    expected = [alone(pipeline, ModelRunner(pipeline, [every_other_step]), req) for req in reqs_of(pipeline)]
    calls: list[ModelCall] = []
    runner = ModelRunner(pipeline, [every_other_step, Stacking(), counting(calls)])
    executions = [Execution(pipeline, req, runner) for req in reqs_of(pipeline)]
    while not executions[0].req.step_index:
        executions[0].advance()
    for execution in executions[1:]:
        while not execution.req.in_loop:
            execution.advance()
    calls.clear()
    forwards = [execution.forwards() for execution in executions]
    results = iter(runner.run([each for own in forwards for each in own]))
    for execution, own in zip(executions, forwards, strict=True):
        execution.advance([next(results) for _ in own])
    assert [call.num_rows for call in calls] == [6], "both branches of three outputs, and nothing of the first"
    for execution, wanted in zip(executions, expected, strict=True):
        while execution.advance():
            pass
        assert (execution.req.outputs[0] - wanted).abs().max() < 1e-4


@contextmanager
def adapted(layer, scale):
    """Add to a linear layer's weights, as an adapter of one request does, for as long as a call takes."""
    weight = layer.weight.detach().clone()
    layer.weight.data.add_(scale * torch.ones_like(weight).tril())
    try:
        yield
    finally:
        layer.weight.data.copy_(weight)


def test_an_adapter_on_a_text_encoder_is_its_requests_own(pipeline):
    """Requests without one, interleaved with those that have one, have their own bytes."""
    layer = next(m for m in pipeline.get_module("text_encoder_2").modules() if isinstance(m, torch.nn.Linear))

    def adapt(forward, make):
        (req,) = forward.reqs
        if forward.call.component != "text_encoder_2" or req.params.prompt != "an old map":
            return make(forward)
        with adapted(layer, 0.5):
            return make(forward)

    runner = ModelRunner(pipeline, [one_by_one(adapt)])
    plain = [alone(pipeline, None, req) for req in reqs_of(pipeline)]
    expected = [alone(pipeline, runner, req) for req in reqs_of(pipeline)]
    same = [torch.equal(one, other) for one, other in zip(plain, expected, strict=True)]
    assert same == [True, True, False, False]
    executions = [Execution(pipeline, req, runner) for req in reqs_of(pipeline)]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    assert all(map(torch.equal, [each.req.outputs[0] for each in executions], expected))


def send(connection, tensors):
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    connection.sendall(struct.pack("<q", len(data)) + data)


def receive(connection):
    def read(size):
        data = b""
        while len(data) < size:
            piece = connection.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    return load(read(struct.unpack("<q", read(8))[0]))


@pytest.fixture
def other_process(pipeline):
    """A process that answers calls of the encoders, and nothing else."""
    import os

    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            while True:
                asked = receive(theirs)
                name, output = (bytes(asked.pop(key).tolist()).decode() for key in ("component", "output"))
                encoder = pipeline.get_module(name)
                with torch.inference_mode():
                    send(theirs, {"made": pipeline.methods[name]["encode"](encoder, output=output, **asked)})
        except EOFError:
            os._exit(0)
        finally:
            os._exit(1)
    theirs.close()
    yield ours
    ours.close()
    assert os.waitpid(child, 0)[1] == 0


def test_an_encoder_in_another_process(pipeline, other_process, monkeypatch):
    """The call has all that it takes, and its result is all that comes back; here no encoder runs."""
    expected = [alone(pipeline, None, req) for req in reqs_of(pipeline)]
    answered = []

    def elsewhere(forward, make):
        call = forward.call
        if not call.component.startswith("text_encoder"):
            return make(forward)
        words = {"component": call.component, "output": call.static["output"]}
        as_bytes = {name: torch.tensor(list(word.encode()), dtype=torch.uint8) for name, word in words.items()}
        send(other_process, {**call.kwargs, **as_bytes})
        answered.append(call.component)
        return receive(other_process)["made"]

    for name in ("text_encoder", "text_encoder_2"):
        monkeypatch.setattr(pipeline.get_module(name), "forward", None)
    runner = ModelRunner(pipeline, [one_by_one(elsewhere)])
    made = [alone(pipeline, runner, req) for req in reqs_of(pipeline)]
    assert all(map(torch.equal, made, expected))
    assert len(answered) == 4 * 2 * 2, "outputs x encoders x branches"


@pytest.mark.parametrize("batching", ["exact", "throughput"])
def test_two_models_in_one_engine(tmp_path, pipeline, batching):
    """Their calls look alike, and are never made as one."""
    all_recipes()["FluxPipeline"].build(tmp_path, "default")
    other = load_pipeline(ServerArgs(str(tmp_path), device="cpu", conditioning_cache="0"))
    with torch.no_grad():
        other.get_module("transformer").proj_out.weight.mul_(0.5)
    models = {"": pipeline, "other": other}
    expected = [alone(models[name], None, req) for name in models for req in reqs_of(models[name])]
    engine = Engine(pipeline, batching=batching, max_running=8, others={"other": other})
    seen: list[ModelCall] = []
    for runner in engine.runners.values():
        ModelRunner.__init__(runner, runner.pipeline, [*runner.way, counting(seen)])
    tasks = []
    for name, model in models.items():
        for req in reqs_of(model):
            req.model, req.request_id = name, f"{name} {req.request_id}"
            tasks.append(engine.add(req))
    while engine.tasks:
        engine.tick()
    made = [task.execution.req.outputs[0] for task in tasks]
    close = torch.equal if batching == "exact" else lambda one, two: bool((one - two).abs().max() < 1e-4)
    assert all(map(close, made, expected))
    assert not torch.equal(expected[0], expected[4])
    assert {call.model for call in seen} == {"", "other"}
    assert max(call.num_rows for call in seen if call.signature is not None) == (1 if batching == "exact" else 8)


def test_the_way_is_one_list_in_the_order_in_which_it_happens(folder):
    """Rows are joined before a component is brought, and it is there before it runs."""
    loaded = load_pipeline(ServerArgs(str(folder), device="cpu"))
    names = [getattr(wrapper, "__qualname__", type(wrapper).__name__) for wrapper in PipelineRunner(loaded, True).way]
    assert names == ["Stacking", "resident.<locals>.bring"]
    order: list[str] = []

    def noting(name):
        def note(forward, make):
            order.append(name)
            return make(forward)

        return one_by_one(note)

    (req, *_) = reqs_of(loaded)
    with Execution(loaded, req, ModelRunner(loaded, [noting("a"), resident(loaded), noting("b")])) as execution:
        while not order:
            execution.advance()
    assert order == ["a", "b"]
