"""Files of newer and older writers, and of whole models of which a part is needed: what Diffusers loads, loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from safelight import DiffusionGenerator, ServerArgs
from safelight.core.registry import resolve_class
from safelight.errors import CheckpointError, ModelIndexError
from safelight.loading.classes import LIBRARY_CLASSES, WEIGHTS_FILES, Source
from safelight.loading.components import load_component
from safelight.loading.loader import load_pipeline
from tests.backends import builders
from tests.loading.conftest import edit_json
from tests.recipes import all_recipes

CPU = torch.device("cpu")
COMMON = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a function that gives a pipeline's folder, built once."""
    folders = {}

    def of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("original") / name
            if name in diffusers_only:
                torch.manual_seed(0)
                getattr(diffusers, name)(**diffusers_only[name](folders[name])).save_pretrained(folders[name])
            else:
                all_recipes()[name].build(folders[name], "default")
        return folders[name]

    return of


diffusers_only = {"StableDiffusionPipeline": builders.stable_diffusion}


@pytest.fixture
def changed(original, tmp_path):
    """Return a function that gives a pipeline's folder to change."""
    return lambda name: shutil.copytree(original(name), tmp_path / name)


def pixels(folder, **fields):
    with DiffusionGenerator.from_pretrained(folder, device="cpu") as generator:
        result = generator.generate(seed=0, output_type="np", **{**COMMON, **fields})
        return result.videos if result.videos is not None and len(result.videos) else result.images


# Settings that a class does not know

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


# Quantised weights


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


# Whole models of which an encoder is needed

TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32))


def t5(name, tied):
    cls = getattr(transformers, name)
    return cls(cls.config_class(**T5, decoder_start_token_id=0, tie_word_embeddings=tied))


WHOLE = {
    "CLIPTextModel": [
        clip,
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT)),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
    ],
    "CLIPVisionModel": [
        clip,
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)),
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    ],
    "T5EncoderModel": [
        lambda: t5("T5ForConditionalGeneration", True),
        lambda: t5("T5ForConditionalGeneration", False),
        lambda: t5("T5Model", True),
        lambda: t5("T5EncoderModel", True),
    ],
    "UMT5EncoderModel": [
        lambda: t5("UMT5ForConditionalGeneration", True),
        lambda: t5("UMT5ForConditionalGeneration", False),
        lambda: t5("UMT5Model", True),
        lambda: t5("UMT5EncoderModel", True),
    ],
}
KINDS = [(name, number) for name, makers in WHOLE.items() for number in range(len(makers))]


def test_every_encoder_of_the_table_is_tried():
    encoders = {name for name in LIBRARY_CLASSES if name.endswith("Model")}
    assert encoders == WHOLE.keys() and {f"transformers:{name}" for name in encoders} <= WEIGHTS_FILES.keys()


def read(folder, name):
    return load_component(Source(folder, f"transformers:{name}"), torch.float32, CPU)


@pytest.mark.parametrize(("name", "number"), KINDS)
def test_an_encoder_out_of_a_whole_models_file(tmp_path, name, number):
    torch.manual_seed(0)
    WHOLE[name][number]().save_pretrained(tmp_path)
    found, expected = read(tmp_path, name), getattr(transformers, name).from_pretrained(tmp_path)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())


@pytest.mark.parametrize("name", WHOLE)
def test_keys_that_are_of_no_whole_model_are_refused(tmp_path, name):
    WHOLE[name][0]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "surplus.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys: surplus\.weight"):
        read(tmp_path, name)


def test_a_whole_clip_file_makes_the_same_picture(original, changed):
    """As people put it into `text_encoder`: the file beside the text model's configuration, or with its own."""
    folder = changed("FluxPipeline")
    part = folder / "text_encoder"
    text = resolve_class("transformers:CLIPTextModel").from_pretrained(part)
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=VISION, projection_dim=32))
    whole.text_model.load_state_dict(text.state_dict())
    expected = pixels(original("FluxPipeline"))
    own = (part / "config.json").read_text()
    whole.save_pretrained(part)
    assert any(key.startswith("vision_model.") for key in load_file(part / "model.safetensors"))
    assert np.array_equal(pixels(folder), expected)
    (part / "config.json").write_text(own)
    assert np.array_equal(pixels(folder), expected)


# Keys of other versions

QWEN: dict[str, Callable[[str], str]] = {
    "older": lambda key: key,
    "newer": lambda key: QWEN["other"](key) if key.startswith("model.") else QWEN["both"](key),
    "both": lambda key: f"model.{key}" if key.startswith("visual.") else key,
    "other": lambda key: key.replace("model.", "model.language_model."),
    "base": lambda key: key.replace("model.", "language_model."),
}
"""From the keys that transformers writes, `visual.` and `model.`, to others that it reads."""


def renamed(folder, style, without=()):
    """Rewrite the text encoder's file with keys of another style, and leave some out."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(without)}
    assert any(key.startswith("visual.") for key in load_file(path))
    save_file({QWEN[style](key): tensor for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def qwen_reference(folder):
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    return cls.from_pretrained(folder / "text_encoder").model.state_dict()


@pytest.mark.parametrize("style", QWEN)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["QwenImagePipeline", "QwenImageEditPipeline"])
def test_styles_of_keys(original, changed, name, style, head):
    folder = changed(name)
    renamed(folder, style, () if head else ("lm_head.",))
    found = load_pipeline(ServerArgs(str(folder), device="cpu")).get_module("text_encoder").state_dict()
    expected, written = qwen_reference(folder), qwen_reference(original(name))
    assert found.keys() == expected.keys() == written.keys()
    assert all(torch.equal(found[key], expected[key]) and torch.equal(found[key], written[key]) for key in found)


@pytest.mark.parametrize("style", ["older", "newer", "base"])
def test_text_to_image_needs_no_visual_part(original, changed, style):
    folder = changed("QwenImagePipeline")
    renamed(folder, style, ("visual.",))
    encoder = load_pipeline(ServerArgs(str(folder), device="cpu")).get_module("text_encoder")
    assert not any(key.startswith("visual.") for key in encoder.state_dict())
    assert np.array_equal(pixels(folder), pixels(original("QwenImagePipeline")))


def test_half_of_a_visual_part_is_refused(changed):
    folder = changed("QwenImagePipeline")
    renamed(folder, "older", ("visual.blocks.",))
    with pytest.raises(CheckpointError, match=r"text_encoder: missing keys: visual\.blocks"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


@pytest.mark.parametrize("name", ["QwenImageEditPipeline", "QwenImageLayeredPipeline"])
def test_editing_needs_the_visual_part(changed, name):
    folder = changed(name)
    renamed(folder, "older", ("visual.",))
    with pytest.raises(CheckpointError, match=r"text_encoder: missing keys: .*visual"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))
