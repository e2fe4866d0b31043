"""Suites over recipes: a test file subclasses one of them, or all of them at once."""

from __future__ import annotations

import pytest

from safelight.testing.suites.alignment import AlignmentSuite
from safelight.testing.suites.answers import AnswersSuite
from safelight.testing.suites.conditioning import ConditioningSuite
from safelight.testing.suites.interleaving import InterleavingSuite
from safelight.testing.suites.outputs import OutputsSuite
from safelight.testing.suites.parity import ParitySuite
from safelight.testing.suites.seeds import SeedsSuite
from safelight.testing.suites.stacking import StackingSuite
from safelight.testing.suites.suite import Suite

__all__ = [
    "AlignmentSuite",
    "AnswersSuite",
    "ConditioningSuite",
    "FamilySuite",
    "InterleavingSuite",
    "OutputsSuite",
    "ParitySuite",
    "SeedsSuite",
    "StackingSuite",
    "StandaloneSuite",
    "Suite",
]

LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "tokenizers", "transformers")
"""Whose warnings, attributed to their own modules, are theirs."""


class StandaloneSuite(
    AlignmentSuite, AnswersSuite, ConditioningSuite, InterleavingSuite, OutputsSuite, SeedsSuite, StackingSuite
):
    """Every suite that needs no reference: for a model that nothing else runs."""

    pytestmark = pytest.mark.filterwarnings(rf"ignore:::({'|'.join(LIBRARIES)})(\.|$)")


class FamilySuite(ParitySuite, StandaloneSuite):
    """Every suite."""
