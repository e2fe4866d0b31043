"""The loaded model's own checks come before anything is computed."""

from __future__ import annotations

import pytest

from safelight.errors import InvalidParameterError
from safelight.stages.input_validation import InputValidationStage
from tests.stages.stubs import StubConfig, drive, request


class Strict(StubConfig):
    """Takes no height above 4."""

    def validate(self, batch):
        if batch.params.height > 4:
            raise InvalidParameterError("height", batch.params.height, "at most 4")


def test_what_the_model_cannot_do_ends_the_request():
    stage = InputValidationStage(Strict())
    with pytest.raises(InvalidParameterError, match="height: got 8; it takes at most 4"):
        drive(stage, request())
    assert drive(stage, request(height=4)) == []
