"""The compiled form of a pipeline's calls: what it is made of, and that both forms take turns."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.common import as_tensor
from safelight.acceleration.compilation import Compilation
from safelight.core.executor import Execution
from safelight.core.form import EAGER
from safelight.core.model_runner import ModelRunner
from safelight.errors import CompilationError, InvalidParameterError
from safelight.runtime.model_runner import PipelineRunner
from safelight.testing.models import requests
from tests.acceleration.compiled import COMPILED, alone, cases_of
from tests.calls import through


@pytest.mark.slow
def test_a_class_of_blocks_is_compiled_once(compiled_flux):
    """Two classes of two blocks each."""
    pipeline, compilation, num_graphs = compiled_flux
    assert len(compilation._classes["transformer"]) == 2
    assert num_graphs == 2
    assert len(pipeline.get_module("transformer").transformer_blocks) == 2, "the blocks are all there again"


def test_both_forms_take_turns_and_give_each_its_bytes(compiled_flux):
    pipeline, compilation, _ = compiled_flux
    first, second = cases_of("FluxPipeline")[:2]
    asked = [(first, EAGER), (first, COMPILED), (second, COMPILED), (second, EAGER)]
    expected = [alone(pipeline, fields, None if form == EAGER else compilation) for fields, form in asked]
    runner = ModelRunner(pipeline, [compilation])
    executions = [Execution(pipeline, requests(pipeline, fields)[0], runner) for fields, _ in asked]
    for execution, (_, form) in zip(executions, asked, strict=True):
        execution.form = form
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    for execution, outputs in zip(executions, expected, strict=True):
        assert torch.equal(execution.req.outputs[0], outputs)


def test_what_no_graph_takes_runs_eagerly_and_compiles_nothing(compiled_flux):
    """Two rows, where one was compiled for: the bytes are those of the eager form, today and tomorrow."""
    from safelight.acceleration.compilation import doubled

    pipeline, compilation, _ = compiled_flux
    call, before = doubled(compilation.calls[0]), counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        compiled = through(compilation, pipeline.forward, COMPILED)
        assert torch.equal(as_tensor(compiled(call)), as_tensor(pipeline.forward(call)))
    assert counters["stats"]["unique_graphs"] == before


def test_a_failed_call_leaves_the_blocks_eager(compiled_flux):
    pipeline, compilation, _ = compiled_flux
    call = compilation.calls[0]
    (each, *_) = compilation._classes["transformer"]
    with torch.inference_mode(), pytest.raises(TypeError):
        empty = type(call)(call.component, {}, {}, call.signature, call.key)
        through(compilation, pipeline.forward, COMPILED)(empty)
    assert each._forward is each._forms["eager"]


def test_a_model_without_repeated_blocks_is_refused(fault_pipeline_of):
    with pytest.raises(InvalidParameterError, match="compile: got 'blocks'; it takes none for this model"):
        PipelineRunner(fault_pipeline_of(compile="blocks"))


@pytest.mark.slow
def test_what_torch_cannot_trace_fails_by_name(tiny_flux, monkeypatch):
    from safelight.layers import stream_blocks

    forward = stream_blocks.DoubleStreamBlock.forward

    def breaks(self, image, *args):
        torch._dynamo.graph_break()
        return forward(self, image, *args)

    monkeypatch.setattr(stream_blocks.DoubleStreamBlock, "forward", breaks)
    compilation = Compilation(tiny_flux())
    with pytest.raises(CompilationError, match="the model cannot be compiled"):
        compilation.finish()
    assert compilation.state == "failed" and compilation.reason
