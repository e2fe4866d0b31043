"""Qwen-Image, where the suites that all families share do not look: what is refused, and what is warned of."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel as ReferenceTransformer
from PIL import Image

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, ModelIndexError, UnknownParameterError, UsageError
from safelight.families.qwen_image import caption, prompts, stages
from safelight.families.qwen_image.params import MAX_INPUT_IMAGES, needs_caption
from safelight.families.qwen_image.transformer import QwenImageTransformer2DModel
from safelight.generator import DiffusionGenerator
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.testing.models import requests
from safelight.testing.recipes import shake
from tests.calls import driven
from tests.recipes import all_recipes
from tests.recipes.qwen_image import CAT, patch_areas, picture

T2I, EDIT, EDIT_PLUS, LAYERED = (f"QwenImage{name}Pipeline" for name in ("", "Edit", "EditPlus", "Layered"))


@pytest.fixture
def schema(tiny_models):
    return lambda pipeline_name: tiny_models.ours(all_recipes()[pipeline_name]).schema


@pytest.mark.parametrize(
    ("pipeline_name", "fields", "param"),
    [
        (T2I, {"prompt": CAT, "height": 100}, "height"),
        (T2I, {"prompt": CAT, "max_sequence_length": 1025}, "max_sequence_length"),
        (T2I, {"prompt": CAT, "sigmas": [1.0, 0.5], "num_inference_steps": 3}, "num_inference_steps"),
        (T2I, {"prompt": CAT, "num_inference_steps": 1}, "num_inference_steps"),
        (T2I, {"prompt": CAT, "sigmas": [1.0]}, "sigmas"),
        (T2I, {"prompt": CAT, "image": picture(8, 8)}, "image"),
        (EDIT, {"prompt": CAT}, "image"),
        (EDIT, {"prompt": CAT, "image": [picture(8, 8)] * 2}, "image"),
        (EDIT, {"prompt": CAT, "image": picture(1, 300)}, "image"),
        (EDIT, {"prompt": CAT, "image": picture(9000, 1)}, "image"),
        (EDIT, {"prompt": CAT, "image": picture(8, 8), "width": 40}, "width"),
        (EDIT, {"prompt": f"a {prompts.IMAGE_PAD}", "image": picture(8, 8)}, "prompt"),
        (EDIT, {"prompt": CAT, "negative_prompt": "<|video_pad|>", "image": picture(8, 8)}, "negative_prompt"),
        (EDIT_PLUS, {"prompt": CAT}, "image"),
        (EDIT_PLUS, {"prompt": CAT, "image": [picture(8, 8)] * (MAX_INPUT_IMAGES + 1)}, "image"),
        (EDIT_PLUS, {"prompt": CAT, "image": [picture(8, 8), picture(1, 700)]}, "image"),
        (LAYERED, {"prompt": CAT}, "image"),
        (LAYERED, {"prompt": CAT, "image": picture(8, 8), "resolution": 800}, "resolution"),
        (LAYERED, {"prompt": CAT, "image": picture(8, 8), "layers": 0}, "layers"),
        (LAYERED, {"prompt": CAT, "image": picture(8, 8), "height": 64}, "height"),
    ],
)
def test_refused(schema, pipeline_name, fields, param):
    with pytest.raises(UsageError) as refusal:
        prepare(schema(pipeline_name), fields)
    assert vars(refusal.value)["param"] == param


@pytest.mark.parametrize("name", ["attention_kwargs", "prompt_embeds_mask", "negative_prompt_embeds_mask", "latents"])
def test_arguments_that_are_done_otherwise_name_our_way(schema, name):
    with pytest.raises(UnknownParameterError, match=r"use |attention_backend"):
        prepare(schema(T2I), {"prompt": CAT, name: 1})


@pytest.mark.parametrize(
    ("pipeline_name", "fields", "warned"),
    [
        (T2I, {}, []),
        (T2I, {"negative_prompt": "dogs"}, []),
        (T2I, {"guidance_scale": 2.0}, ["guidance_scale"]),
        (T2I, {"true_cfg_scale": 3.0}, ["true_cfg_scale"]),
        (T2I, {"true_cfg_scale": 1.0}, []),
        (T2I, {"true_cfg_scale": 1.0, "negative_prompt": "dogs"}, ["negative_prompt"]),
        (EDIT, {"max_sequence_length": 100}, ["max_sequence_length"]),
        (EDIT_PLUS, {"image": [picture(8, 8)] * 4}, ["image"]),
        (LAYERED, {"max_sequence_length": 100}, []),
        (LAYERED, {"use_en_prompt": True}, ["use_en_prompt"]),
        (LAYERED, {"use_en_prompt": True, "prompt": ""}, []),
        (LAYERED, {"cfg_normalize": True}, ["cfg_normalize"]),
    ],
)
def test_warnings_name_what_has_no_effect(schema, pipeline_name, fields, warned):
    image = {} if pipeline_name == T2I else {"image": picture(8, 8, "RGBA" if pipeline_name == LAYERED else "RGB")}
    _, warnings = prepare(schema(pipeline_name), {"prompt": CAT, **image, **fields})
    assert [warning.partition(" ")[0].rstrip(":") for warning in warnings] == warned


def test_the_size_of_an_edit_is_that_of_the_last_image(schema):
    images = [Image.new("RGB", (500, 500)), Image.new("RGB", (1600, 900))]
    params, _ = prepare(schema(EDIT_PLUS), {"prompt": CAT, "image": images})
    assert (params.height, params.width) == (None, None)
    assert params.output_size(schema(EDIT_PLUS).size_multiple) == (768, 1376)
    taller, _ = prepare(schema(EDIT_PLUS), {"prompt": CAT, "image": images, "height": 1024})
    assert taller.output_size(schema(EDIT_PLUS).size_multiple) == (1024, 1376)


def test_templates_are_the_references(tiny_models):
    reference = tiny_models.reference(all_recipes()[LAYERED])
    assert reference.prompt_template_encode == prompts.GENERATION_TEMPLATE.text
    assert reference.prompt_template_encode_start_idx == prompts.GENERATION_TEMPLATE.num_prefix_tokens
    assert reference.image_caption_prompt_en == prompts.CAPTION_PROMPT_EN
    assert reference.image_caption_prompt_cn == prompts.CAPTION_PROMPT_CN
    reference = tiny_models.reference(all_recipes()[EDIT_PLUS])
    assert reference.prompt_template_encode == prompts.EDIT_TEMPLATE.text
    assert reference.prompt_template_encode_start_idx == prompts.EDIT_TEMPLATE.num_prefix_tokens


def test_layers_through_the_public_interface(tiny_models, monkeypatch, tmp_path):
    """A picture without transparency, from a file, and no prompt: layers have it, and the caption is returned."""
    patch_areas(monkeypatch)
    picture(90, 60).save(tmp_path / "picture.png")
    generator = DiffusionGenerator(tiny_models.ours(all_recipes()[LAYERED]))
    result = generator.generate(image=tmp_path / "picture.png", layers=3, num_inference_steps=2, seed=1, n=2)
    assert [image.mode for image in result.images] == ["RGBA"] * 6
    assert [len(output.images) for output in result.outputs] == [3, 3]
    captions = {output.params.prompts()[0] for output in result.outputs}
    assert len(captions) == 1 and not needs_caption(captions.pop())
    again = generator.generate(result.outputs[1].params)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in result.outputs[1].images]
    assert result.warnings == []
    paths = result.save(tmp_path / "layer.png")
    with Image.open(paths[0]) as saved:
        assert len(paths) == 6 and saved.mode == "RGBA"


def sharp(encoder):
    """Return a copy whose attention looks at few tokens, so that their places matter."""
    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        for layer in copied.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.o_proj.weight.mul_(10)
    return copied


@pytest.mark.parametrize(("size", "in_english"), [((90, 100), False), ((150, 40), True)])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, None])
def test_a_caption_in_units_is_the_undivided_one(tiny_models, monkeypatch, size, in_english, num_tokens):
    """Also where it ends last in a unit, or is cut; with a penalty of what is written, and another image in between."""
    patch_areas(monkeypatch)
    pipeline = tiny_models.ours(all_recipes()[LAYERED])
    stage, text_encoder = pipeline.stages["before_denoising"], sharp(pipeline.get_module("text_encoder"))
    monkeypatch.setitem(pipeline.components.modules, "text_encoder", text_encoder)
    config, longest = text_encoder.generation_config, 80
    monkeypatch.setattr(stage, "generation_config", config)
    monkeypatch.setattr(config, "repetition_penalty", 5.0)
    monkeypatch.setattr(config, "eos_token_id", None)
    monkeypatch.setattr(stages, "MAX_CAPTION_TOKENS", longest)
    fields = {"image": picture(size[0], size[1], "RGBA"), "prompt": "", "use_en_prompt": in_english}
    (req,) = requests(pipeline, fields)
    template = prompts.CAPTION_PROMPT_EN if in_english else prompts.CAPTION_PROMPT_CN
    inputs = stage.config.caption_inputs(template, req, stage.tokenizer, stage.processor)

    def undivided():
        ids = text_encoder.generate(**inputs, max_new_tokens=longest, do_sample=False)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    expected = undivided()
    if num_tokens is not None:
        config.eos_token_id = expected[num_tokens - 1]
        expected = undivided()
    assert len(expected) == (num_tokens or longest)
    written, decode = [], stage.tokenizer.decode

    def watched(ids, **options):
        written.append(ids)
        return decode(ids, **options)

    monkeypatch.setattr(stage.tokenizer, "decode", watched)
    num_calls = 0
    with torch.inference_mode():
        for calls in driven(pipeline, stage.write_caption(req, pipeline.server_args)):
            num_calls += len(calls)
            text_encoder.model.rope_deltas = torch.tensor([[-300]])  # which is the last image's, of any request
    assert written[-1] == expected
    assert num_calls == -(-len(expected) // stages.UNIT_TOKENS)


def test_a_prompt_is_required_but_for_layers(schema):
    assert schema(EDIT).json_schema()["required"] == ["prompt", "image"]
    assert schema(LAYERED).json_schema()["required"] == ["image"]


def small_transformer(**config):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 8, "out_channels": 2}
    config = {**sizes, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6), **config}
    reference = shake(ReferenceTransformer(**config), 1)
    ours = QwenImageTransformer2DModel.from_config(config).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def test_padding_is_not_seen():
    """Two texts of unequal length, padded and masked together, give what each gives alone."""
    ours, reference = small_transformer()
    tokens, text = torch.randn(2, 12, 8), torch.randn(2, 7, 24)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    timestep = torch.tensor([0.9, 0.2])
    image_freqs, text_freqs = reference.pos_embed([(1, 3, 4)], max_txt_seq_len=7, device=torch.device("cpu"))
    with torch.inference_mode():
        together = ours(tokens, text, timestep, torch.cat((text_freqs, image_freqs)), encoder_hidden_states_mask=mask)
        expected = reference(tokens, text, mask, timestep, [[(1, 3, 4)]] * 2, return_dict=False)[0]
        freqs_cis = torch.cat((text_freqs[:4], image_freqs))
        alone = ours(tokens[1:], text[1:, :4], timestep[1:], freqs_cis)
    assert torch.allclose(together, expected, atol=1e-5)
    assert torch.allclose(together[1:], alone, atol=1e-5)


def test_embedded_guidance_is_refused(tiny_models, tmp_path):
    """The reference has the option, and neither weights for it nor a forward that takes it."""
    reference = ReferenceTransformer(num_layers=1, attention_head_dim=16, num_attention_heads=1, guidance_embeds=True)
    assert not any("guidance" in name for name in reference.state_dict())
    recipe = all_recipes()[T2I]
    recipe.build(tmp_path, "default")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": True}))
    with pytest.raises(ModelIndexError, match="guidance_embeds"):
        load_pipeline(ServerArgs(str(tmp_path), device="cpu"))


def test_a_name_that_published_configurations_have_is_known():
    config = {"pooled_projection_dim": 768, "num_layers": 1, "num_attention_heads": 1}
    assert len(QwenImageTransformer2DModel.from_config(config).transformer_blocks) == 1


def test_an_unknown_resolution_is_refused_before_images_are_looked_at(schema):
    with pytest.raises(InvalidParameterError, match="640 or 1024"):
        prepare(schema(LAYERED), {"prompt": CAT, "resolution": 641})


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_keys_and_values_have_the_name_that_the_installed_version_takes(tiny_models, monkeypatch, name):
    """Another version's: as it is installed here or not, `generate` is given that name, and read by it."""
    patch_areas(monkeypatch)
    pipeline = tiny_models.ours(all_recipes()[LAYERED])
    stage, text_encoder = pipeline.stages["before_denoising"], pipeline.get_module("text_encoder")
    output_cls = dataclasses.make_dataclass("Output", ["sequences", (name, object, None)])
    assert caption.cache_name(output_cls) == name
    installed, generate, given = caption.CACHE, text_encoder.generate, []

    def renamed(**arguments):
        given.append(name in arguments)
        arguments[installed] = arguments.pop(name)
        made = generate(**arguments)
        return {"sequences": made.sequences, name: made[installed]}

    def written():
        (req,) = requests(pipeline, {"image": picture(90, 100, "RGBA"), "prompt": "", "use_en_prompt": True})
        with torch.inference_mode():
            for _ in driven(pipeline, stage.write_caption(req, pipeline.server_args)):
                pass
        return req.params.prompts()

    monkeypatch.setattr(stages, "UNIT_TOKENS", 4)  # a caption of several units, however soon it ends
    monkeypatch.setattr(stages, "MAX_CAPTION_TOKENS", 40)
    expected = written()
    monkeypatch.setattr(caption, "CACHE", name)
    monkeypatch.setattr(text_encoder, "generate", renamed)
    assert written() == expected
    assert len(given) > 1 and all(given)
