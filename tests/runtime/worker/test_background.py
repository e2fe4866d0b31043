"""The process that fills Inductor's cache: what it is given, what it says, and that it can be ended."""

from __future__ import annotations

import dataclasses
import subprocess

import msgspec
import pytest
import torch

from safelight import ServerArgs
from safelight.acceleration.compilation import Compilation
from safelight.acceleration.compile import CACHE_VARIABLE
from safelight.loading.loader import load_pipeline
from safelight.runtime.processes import python_command
from safelight.runtime.worker.background import BackgroundCompiler, Layout, job_of
from tests.recipes import all_recipes


@pytest.fixture(scope="module")
def compilation(tmp_path_factory):
    root = tmp_path_factory.mktemp("background")
    all_recipes()["FluxPipeline"].build(root / "model", "default")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(root / "cache"))
        yield Compilation(load_pipeline(ServerArgs(str(root / "model"), device="cpu", compile="blocks")))


def test_the_job_of_the_other_process_says_everything_without_weights(compilation):
    job = job_of(compilation)
    assert {call.component for call in job.calls} == set(job.dtypes) == {"transformer"}
    (call,) = job.calls
    frequencies = call.arguments["freqs_cis"]
    assert isinstance(frequencies, Layout) and frequencies.dtype == "complex64"
    assert set(job.dtypes["transformer"].values()) == {"float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
def test_a_layout_is_that_of_its_tensor(dtype):
    tensor = torch.ones(2, 3, 4, dtype=dtype).transpose(0, 2)
    zeros = Layout.of(tensor).zeros(torch.device("cpu"))
    assert (zeros.shape, zeros.stride(), zeros.dtype) == (tensor.shape, tensor.stride(), dtype)
    assert not zeros.any()


@pytest.mark.slow
def test_what_it_cannot_do_it_says_in_one_line(compilation):
    """Whatever else the machine does: here it is no process of the lowest priority."""
    job = job_of(compilation)
    job = msgspec.structs.replace(job, server_args=dataclasses.replace(job.server_args, model="nowhere/at-all"))
    command = python_command("safelight.runtime.worker.background")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        said = process.stdout.read().decode()  # its lifeline stays open meanwhile
    assert process.returncode == 1 and "nowhere/at-all" in said and "\n" not in said


def test_it_is_ended_when_it_takes_too_long(compilation):
    compiler = BackgroundCompiler(compilation, limit=0.0)
    assert compiler.poll() == "compiling took longer than a first unit may"
    assert compiler._process.poll() is not None
