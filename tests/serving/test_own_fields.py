"""The API's own fields, by what a model makes and takes."""

from __future__ import annotations

from safelight.serving.limits import Limits
from safelight.serving.own_fields import EFFECTLESS, IMAGES, INPUT_FIDELITY, INPUT_REFERENCE, own_fields
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, VIDEO_SCHEMA


def test_fields_are_those_of_what_is_made():
    pictures, edits, videos = (own_fields(each, Limits()) for each in (IMAGE_SCHEMA, EDIT_SCHEMA, VIDEO_SCHEMA))
    assert edits.keys() - pictures.keys() == {IMAGES, INPUT_FIDELITY} and pictures.keys() < edits.keys()
    assert videos.keys() - edits.keys() == {"seconds", INPUT_REFERENCE}
    assert {"prompt", "model", "size", "priority", "n", *EFFECTLESS} <= pictures.keys() & videos.keys()


def test_a_bound_is_the_servers():
    assert own_fields(IMAGE_SCHEMA, Limits(outputs=3))["n"].maximum == 3
    assert own_fields(VIDEO_SCHEMA, Limits(outputs=3))["n"].maximum == 1
