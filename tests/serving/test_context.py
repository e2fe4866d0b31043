"""What is done for every route in the same way."""

from __future__ import annotations

import pytest

from safelight.errors import SafelightError
from safelight.serving.context import job_error
from safelight.serving.http.errors import is_internal
from safelight.serving.jobs.job import JobError
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.wire import ASYNC, GENERATIONS


def test_base_url_and_model_names(tmp_path):
    with running(tmp_path, more={"public_url": "https://pictures.example/"}) as server, server.http() as http:
        assert http.get("/").json()["models"] == "https://pictures.example/v1/models"
        error = assert_error(http.post(GENERATIONS, json={"prompt": PROMPT, "model": "another"}), 404, "model")
        assert "'another' is not served here" in error["message"] and error["code"] == "model_not_found"
        assert_error(http.get("/v1/jobs/image_0"), 404)
        job = http.post(GENERATIONS, json={"prompt": PROMPT}, headers=ASYNC).json()["id"]
        assert_error(http.get(f"/v1/videos/{job}"), 404)


@pytest.mark.parametrize(("code", "names_the_job"), [("internal_error", True), ("out_of_memory", False)])
def test_the_error_of_a_job(code, names_the_job):
    class Failed:
        id, error = "image_7", JobError(code, "why", None)

    error = job_error(Failed())  # type: ignore[arg-type]  # of a job, these alone
    assert isinstance(error, SafelightError) and error.code == code and is_internal(error) is names_the_job
    assert ("image_7" in str(error)) is names_the_job and "why" in str(error)
