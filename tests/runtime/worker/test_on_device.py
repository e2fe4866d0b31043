"""What a device's failures do: one of memory ends one request, any other ends the process, and the next one works."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from safelight import ServerArgs
from safelight.core.device import is_out_of_memory
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import requests
from tests.recipes import all_recipes

FIELDS = {"prompt": "a cat", "num_inference_steps": 2, "max_sequence_length": 24}
SMALL = {**FIELDS, "height": 64, "width": 64}
LARGE = {**FIELDS, "height": 2048, "width": 2048}


@pytest.fixture
def folder(tmp_path):
    all_recipes()["FluxPipeline"].build(tmp_path / "model", "default")
    return tmp_path / "model"


def outputs_of(engine, fields):
    (req,) = requests(engine.pipeline, fields)
    task = engine.add(req)
    while not task.done:
        engine.tick()
    return task.execution.req.outputs, task.error


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA's allocator can be bounded")
def test_a_request_without_room_ends_alone(folder, device):
    engine = Engine(load_pipeline(ServerArgs(str(folder), device=str(device))))
    before, _ = outputs_of(engine, SMALL)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total, 0)
    try:
        made, error = outputs_of(engine, LARGE)
        assert not made and is_out_of_memory(error)
        after, error = outputs_of(engine, SMALL)
        assert error is None and torch.equal(after[0], before[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


CHILD = """
import sys
import torch
from safelight import ServerArgs
from safelight.errors import DeviceLostError
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from tests.runtime.worker.test_on_device import SMALL, outputs_of

engine = Engine(load_pipeline(ServerArgs(sys.argv[1], device="cuda")))
outputs_of(engine, SMALL)

def fail(*_):
    torch.zeros(4, device="cuda")[torch.full((1,), 7, device="cuda")]

engine.pipeline.get_module("transformer").register_forward_pre_hook(fail)
try:
    outputs_of(engine, SMALL)
except DeviceLostError:
    print("lost", flush=True)
import os
os._exit(0)
"""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA's failures stay")
def test_an_assertion_on_the_device_loses_it(folder):
    ran = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "lost", ran.stdout + ran.stderr
