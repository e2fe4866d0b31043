"""One component: settings of newer writers, and weights that are quantised."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest

from safelight import ServerArgs
from safelight.errors import ModelIndexError
from safelight.loading.loader import load_pipeline
from tests.loading.conftest import edit_json, pixels

SETTINGS = [
    ("FluxPipeline", "transformer", "config.json"),
    ("FluxPipeline", "vae", "config.json"),
    ("FluxPipeline", "scheduler", "scheduler_config.json"),
    ("QwenImagePipeline", "transformer", "config.json"),
    ("WanPipeline", "transformer", "config.json"),
    ("WanPipeline", "vae", "config.json"),
    ("StableDiffusionPipeline", "unet", "config.json"),
    ("StableDiffusionPipeline", "vae", "config.json"),
    ("StableDiffusionPipeline", "scheduler", "scheduler_config.json"),
]


@pytest.mark.parametrize(("name", "component", "file"), SETTINGS)
def test_settings_of_a_newer_writer_are_left_out_and_logged(original, changed, caplog, name, component, file):
    folder = changed(name)
    edit_json(folder / component / file, surplus={"a": [1]}, _private=3)
    fields = {"num_frames": 5} if name == "WanPipeline" else {}
    made = pixels(folder, **fields)
    said = [line for line in caplog.messages if "'surplus'" in line]
    assert len(said) == 1 and said[0].startswith(f"{component}: ") and "_private" not in caplog.text
    assert np.array_equal(made, pixels(original(name), **fields))


def test_nothing_is_said_of_what_every_writer_writes(original, caplog):
    """The settings of compatible solvers among them, which `from_config` keeps."""
    for name, component, _ in SETTINGS:
        if component == "transformer" or name == "StableDiffusionPipeline":
            load_pipeline(ServerArgs(str(original(name)), device="cpu"))
    assert [line for line in caplog.messages if "does not know" in line] == []


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
def test_a_setting_that_the_reference_knows_is_ours_or_refused(original, changed, name):
    """It would change the reference's pictures, and not ours."""
    config = json.loads((original(name) / "transformer" / "config.json").read_text())
    known = {key for key in config if not key.startswith("_")}
    assert len(known) > 5
    folder = changed(name)
    cls = getattr(diffusers, config["_class_name"])
    assert known <= cls._get_init_keys(cls)
    load_pipeline(ServerArgs(str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("FluxPipeline", "transformer"),
        ("FluxPipeline", "text_encoder_2"),
        ("WanPipeline", "vae"),
        ("StableDiffusionPipeline", "unet"),
        ("StableDiffusionPipeline", "text_encoder"),
        ("StableDiffusionPipeline", "safety_checker"),
    ],
)
@pytest.mark.parametrize(
    ("value", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ("torchao", "'torchao'"),
        ({}, "None"),
    ],
)
def test_quantised_weights_are_named_as_such(changed, name, component, value, method):
    folder = changed(name)
    edit_json(folder / component / "config.json", quantization_config=value)
    with pytest.raises(ModelIndexError) as caught:
        load_pipeline(ServerArgs(str(folder), device="cpu"))
    assert str(caught.value).startswith(f"{component}/config.json: quantization_config: weights quantised by {method}")


def test_no_quantisation_is_none(changed):
    folder = changed("FluxPipeline")
    for component in ("transformer", "text_encoder"):
        edit_json(folder / component / "config.json", quantization_config=None)
    load_pipeline(ServerArgs(str(folder), device="cpu"))
