"""Parity can see: in every case the tiny checkpoints answer to all that they are given."""

from __future__ import annotations

from typing import ClassVar

from safelight.testing.suites import AnswersSuite
from tests.recipes import all_recipes


class TestAnswers(AnswersSuite):
    recipes = tuple(all_recipes().values())
    quick_cases = 2
    # Whose own fields are for `make test-all`: they have the most.
    slow_recipes: ClassVar = {
        "test_every_field_answers_in_some_case": (
            "FluxKontextPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
            "WanImageToVideoPipeline",
        )
    }
