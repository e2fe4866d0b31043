"""A user's fields become resolved parameters: once, at the edge."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
from PIL import Image

from safelight.errors import InvalidParameterError, UnknownParameterError
from safelight.preparation import SEED_RANGE, prepare, warm_up_params
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, VIDEO_SCHEMA


def test_what_is_unset_takes_the_models_defaults_and_a_seed_is_drawn(monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", lambda most: most - 1)
    params, warnings = prepare(IMAGE_SCHEMA, {"prompt": "a cat", "n": 3})
    assert params.seed == SEED_RANGE - 3 - 1, "that of the last output is in a browser's range, too"
    assert params.height is not None and params.width is not None
    assert prepare(IMAGE_SCHEMA, {"prompt": "a cat", "seed": 0})[0].seed == 0
    assert warnings == list(IMAGE_SCHEMA.notes)


def test_what_the_model_does_not_take_is_named():
    with pytest.raises(UnknownParameterError, match="num_frame"):
        prepare(IMAGE_SCHEMA, {"prompt": "a cat", "num_frame": 5})
    with pytest.raises(InvalidParameterError, match=r"^height"):
        prepare(IMAGE_SCHEMA, {"prompt": "a cat", "height": -1})


def test_images_are_opened_and_a_lost_alpha_channel_is_said(tmp_path):
    schema = replace(EDIT_SCHEMA, num_input_images=(0, 2))
    Image.new("RGBA", (48, 32), (1, 2, 3, 4)).save(tmp_path / "a.png")
    params, warnings = prepare(schema, {"prompt": "a cat", "image": tmp_path / "a.png"})
    assert params.image is not None and [(image.size, image.mode) for image in params.image] == [((48, 32), "RGB")]
    assert warnings[-1] == "image: its alpha channel is not used"
    plain, said = prepare(schema, {"prompt": "a cat", "image": [Image.new("RGB", (32, 32))] * 2})
    assert plain.image is not None and len(plain.image) == 2 and said == list(schema.notes)
    with pytest.raises(InvalidParameterError, match=r"^image"):
        prepare(schema, {"prompt": "a cat", "image": 7})


@pytest.mark.parametrize("schema", [IMAGE_SCHEMA, VIDEO_SCHEMA, replace(EDIT_SCHEMA, num_input_images=(1, 1))])
def test_the_first_request_is_small_and_one_that_the_model_takes(schema):
    params = warm_up_params(schema)
    assert params.n == 1 and params.seed == 0
    assert max(params.output_size(schema.size_multiple)) <= 256
    assert params.num_frames in (None, 1 + schema.frame_step)
    assert len(params.image or ()) == schema.num_input_images[0]
