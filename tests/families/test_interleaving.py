"""A request's bytes do not depend on what else runs, on being closed, or on being moved."""

from __future__ import annotations

from safelight.core.executor import Execution
from safelight.testing.models import cases_of, requests
from safelight.testing.suites import InterleavingSuite
from tests.recipes import all_recipes


class TestInterleaving(InterleavingSuite):
    recipes = tuple(all_recipes().values())

    def test_embeddings_and_schedule_are_not_copied(self, recipe, tiny_models):
        """What the calls are given is what the encoder made, and the schedule is the solver's."""
        pipeline = tiny_models.ours(recipe)
        (req,) = requests(pipeline, cases_of(recipe)[0])
        with Execution(pipeline, req) as execution:
            while not req.in_loop:
                execution.advance()
            assert req.pending[0].kwargs["encoder_hidden_states"] is req.prompt_embeds[-1]
            assert req.timesteps is req.scheduler.timesteps
