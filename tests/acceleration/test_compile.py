"""What compiling needs: a cache of the user's own, a toolchain that is there or named, and another process."""

from __future__ import annotations

import os
import shutil
import sysconfig

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from safelight import DiffusionGenerator
from safelight.acceleration import compile as compile_module
from safelight.acceleration.compilation import Compilation
from safelight.acceleration.compile import missing_for_launchers, missing_toolchain
from safelight.errors import CompilationError, InvalidParameterError
from safelight.runtime.worker.background import BackgroundCompiler
from safelight.runtime.worker.model_runner import PipelineRunner
from tests.acceleration.compiled import SECONDS, alone, cases_of, wait

NEAR = 1e-5
"""Of pixels in [0, 1]."""


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
