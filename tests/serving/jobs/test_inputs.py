"""What the engine is given is what was resolved, whatever happened between, or the job fails by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from safelight.serving.admission import Admission
from safelight.serving.jobs.inputs import new_job
from tests.serving.disks import as_left_by_a_death
from tests.serving.job_server import picture, prepared, serving, unfinished
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, StubEngine


@pytest.mark.parametrize(
    ("schema", "prompt", "fields"),
    [
        (IMAGE_SCHEMA, "a", {"sigmas": [1.0, 1 / 3], "num_inference_steps": 2, "seed": 2**64 - 1, "true_cfg_scale": 2}),
        (IMAGE_SCHEMA, ("a", "b"), {"negative_prompt": ("c", "d"), "n": 2}),
        (EDIT_SCHEMA, "a", {"images": {"image": [picture(form="WEBP")]}}),
        (IMAGE_TO_VIDEO_SCHEMA, "a", {"images": {"image": [picture()], "last_image": [picture(colour="blue")]}}),
    ],
    ids=["numbers", "prompts", "image", "two-fields"],
)
def test_the_engine_is_given_what_was_resolved_before_and_after_a_restart(tmp_path, schema, prompt, fields):
    """Types included: what was a tuple is one again, what was unset is unset, and pictures have the same pixels."""
    asked, _ = prepared(StubEngine(schema), prompt, **fields)
    images, output_format = fields.get("images", {}), "mp4" if schema.task.makes_video else "png"

    async def accept(server):
        job = await server.jobs.acceptance.submit(
            *new_job(asked, schema, images, output_format=output_format), Admission()
        )
        assert {server.outputs.path(file.name).read_bytes() for file in job.inputs} == {
            data for datas in images.values() for data in datas
        }

    async def run(server):
        (job,) = await unfinished(server.store)
        assert (await server.end(job)).state == "completed"
        return server.engine.submitted[0].params

    serving(tmp_path, accept, StubEngine(schema, state="restarting"), max_submitted=0)
    given = serving(tmp_path, run, StubEngine(schema))
    assert type(given) is type(asked)
    for field in dataclasses.fields(given):
        ours, theirs = getattr(given, field.name), getattr(asked, field.name)
        assert decoded(ours) == decoded(theirs) and type(decoded(ours)) is type(decoded(theirs)), field.name


def decoded(value):
    """Return pictures as their pixels; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(decoded, value))
    return np.asarray(value).tolist() if isinstance(value, Image.Image) else value


def test_jobs_of_another_model_and_lost_inputs_fail_by_name(tmp_path):
    async def accept(server):
        return [await server.submit(images={"image": [picture()]}) for _ in range(2)]

    async def fail(server):
        server.outputs.path(jobs[0].inputs[0].name).unlink()
        server.engine.state = "ready"
        first, second = [await server.end(job) for job in jobs]
        assert first.error.code == "internal_error" and str(tmp_path) not in first.error.message
        assert second.state == "completed"

    async def other(server):
        job = await server.end((await unfinished(server.store))[0])
        assert job.error is not None and job.error.code == "model_not_found"

    jobs = serving(tmp_path / "state", accept, StubEngine(EDIT_SCHEMA, state="restarting"))
    as_left_by_a_death(tmp_path / "state", tmp_path / "left")
    serving(tmp_path / "left", other)
    serving(tmp_path / "state", fail, StubEngine(EDIT_SCHEMA, state="failed"))
