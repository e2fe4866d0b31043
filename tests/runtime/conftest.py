"""Models that fail on demand, in this process and in workers."""

from __future__ import annotations

import json

import pytest

from safelight import ServerArgs
from safelight.core.executor import SyncExecutor
from safelight.core.request import Req
from safelight.loading.loader import load_pipeline


@pytest.fixture
def fault_folder(tmp_path):
    """Return a function that writes a model's folder."""

    def make(pipeline_name="FaultPipeline", step_seconds=0.0, name="model", **details):
        folder = tmp_path / name
        folder.mkdir()
        index = {"_class_name": pipeline_name, "_diffusers_version": "0.42.1", "step_seconds": step_seconds}
        index.update(details)
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def fault_pipeline(fault_family, fault_folder):
    """Return a loaded pipeline of the given class."""

    def load(pipeline_name="FaultPipeline", step_seconds=0.0, **details):
        return load_pipeline(ServerArgs(str(fault_folder(pipeline_name, step_seconds, **details)), device="cpu"))

    return load


@pytest.fixture
def expected(fault_pipeline):
    """Return a function: the picture that a request gives alone, in process."""
    pipeline = fault_pipeline()

    def make(**fields):
        req = request(pipeline, **fields)
        for _ in SyncExecutor(pipeline).execute(req):
            pass
        return req.outputs[0].numpy()

    return make


def request(pipeline, prompt="a cat", request_id="r0", **fields):
    """Return the one output of a request."""
    asked = {"prompt": prompt, "seed": 0, **fields}
    params = pipeline.schema.params_cls.from_fields(asked).resolve(pipeline.schema)
    (single,) = params.split()
    return Req(request_id, single)
