"""Models that fail on demand, in this process and in workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from safelight import ServerArgs
from safelight.core import registry
from safelight.core.request import Req
from safelight.loading.loader import load_pipeline

FAULT = Path(__file__).parents[1] / "fault"


@pytest.fixture(scope="session", autouse=True)
def fault_path():
    """Make the package importable here; only `fault_family` registers it."""
    sys.path.insert(0, str(FAULT))
    yield
    sys.path.remove(str(FAULT))


@pytest.fixture(scope="package")
def fault_family(fault_path):
    """Register the pipelines here and in processes that are started."""
    import os

    registry.pipelines()
    known = dict(registry._entries)
    from safelight_fault import register

    registry._entries.update({**registry._entries, **registered(register)})
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(FAULT) if before is None else f"{FAULT}:{before}"
    yield
    registry._entries.clear()
    registry._entries.update(known)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


_registered: dict[str, registry.PipelineEntry] = {}


def registered(module) -> dict[str, registry.PipelineEntry]:
    """Return what the module registered when it was first imported."""
    if not _registered:
        _registered.update({n: e for n, e in registry._entries.items() if e.model_family == "fault"})
    return _registered


@pytest.fixture
def fault_model(tmp_path):
    """Return a function that writes a model's folder."""

    def make(pipeline_name="FaultPipeline", step_seconds=0.0, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        index = {"_class_name": pipeline_name, "_diffusers_version": "0.42.1", "step_seconds": step_seconds}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def fault_pipeline(fault_family, fault_model):
    """Return a loaded pipeline of the given class."""

    def load(pipeline_name="FaultPipeline", step_seconds=0.0):
        return load_pipeline(ServerArgs(str(fault_model(pipeline_name, step_seconds)), device="cpu"))

    return load


def request(pipeline, prompt="a cat", request_id="r0", **fields):
    """Return the one output of a request."""
    asked = {"prompt": prompt, "seed": 0, **fields}
    params = pipeline.schema.params_cls.from_fields(asked).resolve(pipeline.schema)
    (single,) = params.split()
    return Req(request_id, single)
