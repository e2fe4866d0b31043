"""The compiled form of a pipeline's calls: near the eager one, one graph a class, and both forms at any time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.common import as_tensor
from safelight import ServerArgs
from safelight.acceleration.compilation import Compilation
from safelight.acceleration.compile import warm_up_compiler
from safelight.core.executor import Execution
from safelight.core.form import EAGER
from safelight.core.model_runner import ModelRunner
from safelight.errors import CompilationError, InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.background import Layout, job_of
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.testing.models import requests
from tests.acceleration.compiled import COMPILED, alone, cases_of
from tests.calls import through

NEAR = 1e-5
"""Of pixels in [0, 1]."""
SECONDS = 300.0


@pytest.fixture(scope="module")
def compiled_flux(tiny_folder):
    """Return a tiny model and its compiled form, and how many graphs that took."""
    pipeline = load_pipeline(ServerArgs(str(tiny_folder("FluxPipeline")), device="cpu", compile="blocks"))
    warm_up_compiler()
    counters.clear()
    compilation = Compilation(pipeline)
    compilation.finish()
    return pipeline, compilation, counters["stats"]["unique_graphs"]


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


class PythonCalls:
    """Counts the calls of a Python function: of an eager block there are some, of a compiled one none."""

    def __init__(self, function):
        self._code = function.__code__
        self.count = 0

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _profile(self, frame, event, _):
        self.count += event == "call" and frame.f_code is self._code


def test_compiled_blocks_are_near_and_no_size_compiles_again(compiled_flux):
    from safelight.layers.modulation import Modulation

    pipeline, compilation, _ = compiled_flux
    before, sizes = counters["stats"]["unique_graphs"], set()
    for fields in cases_of("FluxPipeline"):
        expected = alone(pipeline, fields)
        with PythonCalls(Modulation.forward) as eager:
            made = alone(pipeline, fields, compilation)
        assert eager.count == 0, "every block ran compiled"
        assert (made - expected).abs().max() < NEAR
        assert not torch.equal(made, expected), "no kernel of the two is the same"
        sizes.add(made.shape)
    assert len(sizes) >= 2 and counters["stats"]["unique_graphs"] == before


SECOND_PROCESS = """
import json, sys, torch
torch.set_num_threads(1)
from torch._dynamo.utils import counters
from safelight import DiffusionGenerator
with DiffusionGenerator.from_pretrained(sys.argv[1], device="cpu", compile="blocks") as generator:
    made = generator.generate(**json.loads(sys.argv[2]), output_type="np").images[0]
counted = counters["inductor"]
print(json.dumps({
    "hits": counted["fxgraph_cache_hit"], "misses": counted["fxgraph_cache_miss"], "bytes": made.tobytes().hex(),
}))
"""


@pytest.mark.slow
def test_a_second_process_finds_everything_in_the_cache(compiled_flux, tiny_folder):
    """In process, with the same bytes: it is another first request than this process had."""
    pipeline, compilation, _ = compiled_flux
    fields = {"prompt": "a cat", "seed": 3, "height": 48, "width": 80, "num_inference_steps": 2}
    expected = alone(pipeline, fields, compilation)
    arguments = [str(tiny_folder("FluxPipeline")), json.dumps(fields)]
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, *arguments], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["hits"], said["misses"]) == (2, 0)
    assert said["bytes"] == expected.contiguous().numpy().tobytes().hex()


def test_the_job_of_the_other_process_says_everything_without_weights(compiled_flux):
    _, compilation, _ = compiled_flux
    job = job_of(compilation)
    assert {call.component for call in job.calls} == set(job.dtypes) == {"transformer"}
    (call,) = job.calls
    frequencies = call.arguments["freqs_cis"]
    assert isinstance(frequencies, Layout) and frequencies.dtype == "complex64"
    assert set(job.dtypes["transformer"].values()) == {"float32"}
