"""Files of whole models of which a part is needed, and keys of other versions: what the libraries load, loads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from safelight import ServerArgs
from safelight.core.registry import resolve_class
from safelight.errors import CheckpointError
from safelight.loading.classes import LIBRARY_CLASSES, WEIGHTS_FILES, Source
from safelight.loading.components import load_component
from safelight.loading.loader import load_pipeline
from tests.loading.conftest import pixels

CPU = torch.device("cpu")


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
