"""Compiled blocks: near eager ones, one graph a class, both forms at any time, and a cache that lasts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from benchmarks.common import as_tensor
from safelight import DiffusionGenerator, ServerArgs
from safelight.acceleration import compile as compile_module
from safelight.acceleration.compilation import Compilation
from safelight.acceleration.compile import missing_for_launchers, missing_toolchain, warm_up_compiler
from safelight.core.executor import Execution, SyncExecutor
from safelight.core.form import EAGER, Form
from safelight.core.model_runner import ModelRunner
from safelight.errors import CompilationError, InvalidParameterError
from safelight.runtime.worker.background import BackgroundCompiler, job_of
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.testing.models import requests
from tests.calls import through
from tests.recipes import all_recipes

NEAR = 1e-5
"""Of pixels in [0, 1]."""
SECONDS = 300.0
COMPILED = Form("compiled")


def alone(pipeline, fields, compilation=None):
    (req,) = requests(pipeline, fields)
    runner = None if compilation is None else ModelRunner(pipeline, [compilation])
    for _ in SyncExecutor(pipeline, runner, COMPILED).execute(req):
        pass
    return req.outputs[0]


def cases_of(pipeline_name):
    """Return requests of several sizes, text lengths and branches."""
    cases = [case for case in all_recipes()[pipeline_name].cases if case.variant == "default" and not case.slow]
    return [{**case.fields, "n": 1} for case in cases if isinstance(case.fields["prompt"], str)]


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


@pytest.fixture(scope="module")
def flux(tiny_folder):
    """Return a tiny model and its compiled form, and how many graphs that took."""
    from safelight.loading.loader import load_pipeline

    pipeline = load_pipeline(ServerArgs(str(tiny_folder("FluxPipeline")), device="cpu", compile="blocks"))
    warm_up_compiler()
    counters.clear()
    compilation = Compilation(pipeline)
    compilation.finish()
    return pipeline, compilation, counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_class_of_blocks_is_compiled_once(flux):
    """Two classes of two blocks each."""
    pipeline, compilation, num_graphs = flux
    assert len(compilation._classes["transformer"]) == 2
    assert num_graphs == 2
    assert len(pipeline.get_module("transformer").transformer_blocks) == 2, "the blocks are all there again"


def test_compiled_blocks_are_near_and_no_size_compiles_again(flux):
    from safelight.layers.modulation import Modulation

    pipeline, compilation, _ = flux
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


def test_both_forms_take_turns_and_give_each_its_bytes(flux):
    pipeline, compilation, _ = flux
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


def test_what_no_graph_takes_runs_eagerly_and_compiles_nothing(flux):
    """Two rows, where one was compiled for: the bytes are those of the eager form, today and tomorrow."""
    from safelight.acceleration.compilation import doubled

    pipeline, compilation, _ = flux
    call, before = doubled(compilation.calls[0]), counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        compiled = through(compilation, pipeline.forward, COMPILED)
        assert torch.equal(as_tensor(compiled(call)), as_tensor(pipeline.forward(call)))
    assert counters["stats"]["unique_graphs"] == before


def test_a_failed_call_leaves_the_blocks_eager(flux):
    pipeline, compilation, _ = flux
    call = compilation.calls[0]
    (each, *_) = compilation._classes["transformer"]
    with torch.inference_mode(), pytest.raises(TypeError):
        empty = type(call)(call.component, {}, {}, call.signature, call.key)
        through(compilation, pipeline.forward, COMPILED)(empty)
    assert each._forward is each._forms["eager"]


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
def test_a_second_process_finds_everything_in_the_cache(flux, tiny_folder):
    """In process, with the same bytes: it is another first request than this process had."""
    pipeline, compilation, _ = flux
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


@pytest.mark.parametrize("named", ["nobody", "torch", "the user"])
def test_the_cache_is_the_users_and_closed_to_others(tmp_path, monkeypatch, named):
    """Dynamo names a folder that all share when it is imported, which in a real process is before this."""
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / "own"
    names = {"nobody": None, "torch": default_cache_dir(), "the user": str(own)}
    if names[named] is None:
        monkeypatch.delenv(compile_module.CACHE_VARIABLE)
    else:
        monkeypatch.setenv(compile_module.CACHE_VARIABLE, names[named])
    folder = compile_module.use_cache()
    assert folder == (own if named == "the user" else tmp_path / ".cache" / "safelight" / "inductor")
    assert os.environ[compile_module.CACHE_VARIABLE] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_used_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compile_module.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(CompilationError, match=compile_module.CACHE_VARIABLE):
        compile_module.use_cache()


def test_a_model_without_repeated_blocks_is_refused(fault_pipeline_of):
    with pytest.raises(InvalidParameterError, match="compile: got 'blocks'; it takes none for this model"):
        PipelineRunner(fault_pipeline_of(compile="blocks"))


def test_without_a_compiler_it_is_refused_with_the_reason(tiny_folder, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert missing_toolchain("cpu") is not None
    with pytest.raises(InvalidParameterError, match=r"compile: .* compiling needs a C\+\+ compiler"):
        DiffusionGenerator.from_pretrained(tiny_folder("FluxPipeline"), device="cpu", compile="blocks")


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


def test_the_job_of_the_other_process_says_everything_without_weights(flux):
    _, compilation, _ = flux
    job = job_of(compilation)
    assert {call.component for call in job.calls} == set(job.dtypes) == {"transformer"}
    (call,) = job.calls
    assert call.arguments["freqs_cis"].dtype == "complex64"
    assert set(job.dtypes["transformer"].values()) == {"float32"}


def wait(filler):
    end = time.monotonic() + SECONDS
    while (reason := filler.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline", "QwenImagePipeline", "WanImageToVideoPipeline"])
def test_another_process_fills_the_cache_and_every_family_is_near(tiny, name, tmp_path, monkeypatch):
    """Stacked calls too; this process only finds what the other compiled."""
    monkeypatch.setenv(compile_module.CACHE_VARIABLE, str(tmp_path))
    pipeline = tiny(name, compile="blocks")
    compilation = Compilation(pipeline, stacked=True)
    assert wait(BackgroundCompiler(compilation, SECONDS)) == ""
    counters.clear()
    compilation.finish()
    assert counters["inductor"]["fxgraph_cache_hit"] >= 2 and counters["inductor"]["fxgraph_cache_miss"] == 0
    for fields in cases_of(name)[:3]:
        expected, made = alone(pipeline, fields), alone(pipeline, fields, compilation)
        assert (made - expected).abs().max() < NEAR and not torch.equal(made, expected)


@pytest.mark.slow
def test_the_other_process_fails_with_a_reason_and_ends_with_us(tiny_flux):
    compilation = Compilation(tiny_flux(compile="blocks"))
    filler = BackgroundCompiler(compilation, limit=0.0)
    assert "longer" in wait(filler)
    filler = BackgroundCompiler(compilation, limit=SECONDS)
    assert filler._process.stdin is not None
    filler._process.stdin.close()
    assert "exit code 1" in wait(filler)


@pytest.mark.slow
def test_bfloat16_is_compiled_for_itself(tiny_flux):
    pipeline = tiny_flux(compile="blocks", dtype="bfloat16")
    runner = PipelineRunner(pipeline)
    runner.finish_compiling()
    fields = cases_of("FluxPipeline")[0]
    made, expected = alone(pipeline, fields, runner.compilation), alone(pipeline, fields)
    assert (made - expected).abs().max() < 0.05 and not torch.equal(made, expected)


@pytest.mark.parametrize(
    ("compilers", "headers", "missing"),
    [
        ((), True, "a C compiler (gcc or clang), and there is none"),
        (("gcc",), False, "the headers of Python (Debian: python3-dev), and they are not here"),
        (("gcc",), True, None),
        (("clang",), True, None),
    ],
)
def test_what_building_launchers_lacks_is_named(monkeypatch, tmp_path, compilers, headers, missing):
    """Slim images have Triton, and neither a compiler nor headers."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    if headers:
        (tmp_path / "Python.h").touch()
    assert missing_for_launchers() == missing
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert missing_toolchain("cuda") == missing
    monkeypatch.setenv("CC", "icx")
    told = missing_for_launchers()
    assert told is not None and told.startswith("a C compiler (icx)")
