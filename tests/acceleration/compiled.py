"""Requests of a tiny model, eagerly and by compiled blocks."""

from __future__ import annotations

import time

from safelight.core.executor import SyncExecutor
from safelight.core.form import Form
from safelight.core.model_runner import ModelRunner
from safelight.testing.models import requests
from tests.recipes import all_recipes

COMPILED = Form("compiled")
SECONDS = 300.0
"""That another process may compile."""


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


def wait(filler):
    end = time.monotonic() + SECONDS
    while (reason := filler.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return reason
