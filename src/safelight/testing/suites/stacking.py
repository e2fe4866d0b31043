"""Requests whose calls are made as one forward give what each gives alone, as near as a forward of more rows allows."""

from __future__ import annotations

import torch

from safelight.checking.report import OK
from safelight.checking.stacking import stacking_rows
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import TinyModels, alone, cases_of, requests
from safelight.testing.recipes import Recipe
from safelight.testing.suites.suite import Suite

TOLERANCE = 1e-4


class StackingSuite(Suite):
    """`batching="throughput"`, and what `shared_kwargs` and `call_signature` say for it."""

    def test_a_call_stacked_with_another_requests_is_itself(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Each branch of each case, with a request of another text, seed, scale and step."""
        pipeline = tiny_models.ours(recipe)
        for fields in cases_of(recipe):
            (req,) = requests(pipeline, fields)
            faults = [row for row in stacking_rows(pipeline, req.params, TOLERANCE) if row.verdict != OK]
            assert not faults, [f"{row.what}: {row.note or row.largest}" for row in faults]

    def test_two_requests_that_share_forwards_make_what_each_makes_alone(
        self, recipe: Recipe, tiny_models: TinyModels
    ) -> None:
        """Through the engine, from beginning to end."""
        pipeline, fields = tiny_models.ours(recipe), cases_of(recipe)[0]
        asked = [{**fields, "seed": seed} for seed in (5, 6)]
        times = iter(range(10**9))
        engine = Engine(pipeline, clock=lambda: float(next(times)), batching="throughput")
        tasks = []
        for index, each in enumerate(asked):
            (req,) = requests(pipeline, each)
            req.request_id = f"r{index}"
            tasks.append(engine.add(req))
        while engine.tasks:
            engine.tick()
        for task, each in zip(tasks, asked, strict=True):
            assert task.error is None, task.error
            for made, expected in zip(task.execution.req.outputs, alone(pipeline, each), strict=True):
                assert torch.allclose(made, expected, rtol=0, atol=TOLERANCE)
