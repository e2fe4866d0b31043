"""Tiny random Qwen-Image checkpoints, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from safelight.testing.recipes import Case, Difference, Recipe, shake, square_default
from safelight.testing.tokenizers import qwen2_tokenizer

CAT = "a photo of a cat sitting on a red chair"
MAP = "an old map of the world, drawn in ink; ships, whales and a compass rose beside the naïve café of 漢字 dogs"
TRUE_CFG = {"negative_prompt": "blurry, low quality", "true_cfg_scale": 3.0}
NO_EMBEDDED_GUIDANCE = "no model has weights for an embedded guidance scale"
SHRINK = 64
"""Areas are so many times smaller than the reference's."""

ENCODER_GAINS = {"*.attn.qkv.weight": 6.0, "*.attn.proj.weight": 6.0, "*.self_attn.?_proj.weight": 6.0}
"""Attention that tells places apart, in a text encoder whose matrices begin near zero."""
TRANSFORMER_GAINS = {"*.attn.to_out.0.weight": 6.0, "*.attn.norm_*": 2.0}
"""Attention that picks out, and what it picks."""


class PilQwen2VLProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """The reference's processor without videos, which need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Take any class."""
        return type(argument)


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Return a text encoder that sees images, and that soon stops when it writes."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, tie_word_embeddings=False, **ids)
    )
    stops = [tokenizer.eos_token_id, *range(0, 400, 3)]
    encoder.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return encoder


VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def build(pipeline_name: str) -> Callable[[Path, str], None]:
    """Return what writes a checkpoint of a pipeline."""
    layered, edit = pipeline_name == "QwenImageLayeredPipeline", pipeline_name != "QwenImagePipeline"

    def write(folder: Path, variant: str) -> None:
        torch.manual_seed(0)
        tokenizer = qwen2_tokenizer(folder / "tokenizer")
        transformer = QwenImageTransformer2DModel(
            in_channels=24,
            out_channels=6,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=variant == "zero_cond_t",
            use_additional_t_cond=layered,
            use_layer3d_rope=layered,
        )
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=6,  # not 4, or the reference takes RGBA pixels for latents
            num_res_blocks=1,
            input_channels=4 if layered else 3,
            latents_mean=[-0.76, 0.11, 0.97, -0.15, 0.41, -0.95],
            latents_std=[2.8, 1.5, 2.3, 0.7, 1.2, 2.1],
        )
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=96, shift_terminal=0.02
        )
        components = {
            "scheduler": scheduler,
            "vae": shake(vae, 1),
            "text_encoder": shake(text_encoder(tokenizer), 2, gains=ENCODER_GAINS),
            "tokenizer": tokenizer,
            "transformer": shake(transformer, 3, gains=TRANSFORMER_GAINS),
        }
        if edit:
            components["processor"] = None
        getattr(diffusers, pipeline_name)(**components).save_pretrained(folder)
        if edit:
            write_processor(folder, tokenizer)

    return write


def write_processor(folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Add the processor as published repositories have it."""
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    tokenizer.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def load_reference(pipeline_name: str) -> Callable[..., Any]:
    """Return what loads a reference that has a processor."""

    def load(folder: Path, **kwargs: Any) -> Any:
        processor = PilQwen2VLProcessor(
            Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
            Qwen2Tokenizer.from_pretrained(folder / "processor"),
        )
        return getattr(diffusers, pipeline_name).from_pretrained(folder, processor=processor, **kwargs)

    return load


def image_positions(ids: torch.Tensor, grids: torch.Tensor, image_token: int, merge: int) -> torch.Tensor:
    """Return where tokens [S] stand, [4, 1, S]: each one's number, then its time, row and column.

    After Qwen2-VL's report (Wang et al., 2024, arXiv:2409.12191): the three are equal for words. An image's tokens have
    the time at which it begins, and from there on their rows and columns; what follows begins behind the largest.
    """
    places: list[tuple[int, int, int]] = []
    following, left = 0, [tuple(int(side) // merge for side in grid[1:]) for grid in grids]
    tokens = iter(ids.tolist())
    for token in tokens:
        if token != image_token:
            places.append((following,) * 3)
            following += 1
            continue
        rows, columns = left.pop(0)
        places += [(following, following + row, following + column) for row in range(rows) for column in range(columns)]
        for _ in range(rows * columns - 1):
            assert next(tokens) == image_token
        following += max(rows, columns)
    numbers = torch.arange(len(places))[None]
    return torch.cat((numbers, torch.tensor(places).T))[:, None]


def place_images(pipe: Any) -> None:
    """Give the text encoder the positions of images' tokens, as its authors' code has them."""
    config = pipe.text_encoder.config

    def place(_encoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        merge, token = config.vision_config.spatial_merge_size, config.image_token_id
        positions = image_positions(kwargs["input_ids"][0], kwargs["image_grid_thw"], token, merge)
        return args, {**kwargs, "position_ids": positions}

    pipe.text_encoder.register_forward_pre_hook(place, with_kwargs=True)


def without_places(monkeypatch: Any) -> None:
    """Let our text encoder count images' tokens like words."""
    from safelight.families.qwen_image import config

    given = config.vision_inputs

    def counted(*args: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in given(*args).items() if name != "mm_token_type_ids"}

    monkeypatch.setattr(config, "vision_inputs", counted)


UNPLACED = Difference(
    "tokens of input images are counted like words in the text encoder, without their rows and columns",
    correct=place_images,
    unlearn=without_places,
)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a picture with something at every scale."""
    x = torch.linspace(0, 1, width)[None, :, None]
    y = torch.linspace(0, 1, height)[:, None, None]
    waves = torch.sin(40 * x * y + torch.tensor([0.0, 1.0, 2.0, 3.0])) * 0.5 + 0.5
    return Image.fromarray((waves[..., : len(mode)] * 255).round().to(torch.uint8).numpy(), mode)


def patch_areas(monkeypatch: Any) -> None:
    """Make the areas that images are fitted to smaller, in the reference and here: a megapixel takes long."""
    from diffusers.pipelines.qwenimage import (
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_plus,
        pipeline_qwenimage_layered,
    )

    from safelight.families.qwen_image import params

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_layered):
        monkeypatch.setattr(module, "calculate_dimensions", shrunk(module.calculate_dimensions))
    monkeypatch.setattr(params, "fitted_size", shrunk(params.fitted_size))


def shrunk(fit: Callable[[float, Any], Any]) -> Callable[[float, Any], Any]:
    """Return the same function for a smaller area."""
    return lambda area, shape: fit(area / SHRINK, shape)


def unknown_size(pipe: Any) -> tuple[None, None]:
    """Return no default size: it is that of the input image, fitted."""
    return None, None


QWEN_IMAGE = Recipe(
    "QwenImagePipeline",
    build("QwenImagePipeline"),
    cases=(
        Case("48x80", {"prompt": CAT, "height": 48, "width": 80, "num_inference_steps": 4}),
        Case(
            "true CFG, long prompt",
            {"prompt": MAP, "height": 112, "width": 32, "num_inference_steps": 5, "seed": 11, **TRUE_CFG},
        ),
        Case(
            "long negative prompt, scale 1.5, cut texts",
            {
                "prompt": CAT,
                "negative_prompt": MAP,
                "true_cfg_scale": 1.5,
                "height": 64,
                "width": 48,
                "num_inference_steps": 3,
                "max_sequence_length": 80,
            },
        ),
        Case(
            "negative prompt, scale 1",
            {
                "prompt": CAT,
                "negative_prompt": MAP,
                "true_cfg_scale": 1.0,
                "height": 32,
                "width": 48,
                "num_inference_steps": 2,
            },
            unanswered={"negative prompt": "there is no second branch at scale 1"},
        ),
        Case(
            "two prompts, n=2, true CFG",
            {"prompt": [CAT, MAP], "n": 2, "height": 48, "width": 64, "num_inference_steps": 3, "seed": 5, **TRUE_CFG},
        ),
        Case("own sigmas, empty prompt", {"prompt": "", "height": 32, "width": 64, "sigmas": [1.0, 0.7, 0.3]}),
        Case("defaults", {"prompt": CAT, "num_inference_steps": 2}, slow=True),
    ),
    default_size=square_default,
    silent={"guidance_scale": NO_EMBEDDED_GUIDANCE},
)

EDIT = Recipe(
    "QwenImageEditPipeline",
    build("QwenImageEditPipeline"),
    cases=(
        Case("true CFG", {"prompt": CAT, "image": picture(150, 90), "num_inference_steps": 4, **TRUE_CFG}),
        Case(
            "own size, long prompt",
            {"prompt": MAP, "image": picture(61, 87), "height": 48, "width": 112, "num_inference_steps": 3, "seed": 2},
        ),
        Case(
            "own height",
            {"prompt": CAT, "image": picture(300, 40), "height": 80, "num_inference_steps": 3, "seed": 3, **TRUE_CFG},
        ),
        Case(
            "two prompts, n=2, true CFG",
            {
                "prompt": [CAT, MAP],
                "image": picture(90, 100),
                "n": 2,
                "num_inference_steps": 2,
                "seed": 9,
                **TRUE_CFG,
            },
        ),
        Case("one pixel", {"prompt": "", "image": picture(1, 1), "num_inference_steps": 2}),
        Case(
            "a megapixel",
            {"prompt": CAT, "image": picture(150, 90), "num_inference_steps": 2, **TRUE_CFG},
            slow=True,
            patched=False,
        ),
    ),
    patch=patch_areas,
    load_reference=load_reference("QwenImageEditPipeline"),
    difference=UNPLACED,
    silent={"guidance_scale": NO_EMBEDDED_GUIDANCE, "max_sequence_length": "prompts that go with images are not cut"},
    default_size=unknown_size,
    one_at_a_time=True,
)

EDIT_PLUS = Recipe(
    "QwenImageEditPlusPipeline",
    build("QwenImageEditPlusPipeline"),
    cases=(
        Case("one image, true CFG", {"prompt": CAT, "image": picture(150, 90), "num_inference_steps": 4, **TRUE_CFG}),
        Case(
            "two images, own size",
            {
                "prompt": MAP,
                "image": [picture(61, 87), picture(100, 40)],
                "height": 64,
                "width": 48,
                "num_inference_steps": 3,
                "seed": 4,
            },
        ),
        Case(
            "three images, true CFG",
            {
                "prompt": CAT,
                "image": [picture(61, 87), picture(100, 40), picture(200, 220)],
                "num_inference_steps": 3,
                "seed": 5,
                **TRUE_CFG,
            },
        ),
        Case(
            "time 0 for images, true CFG",
            {
                "prompt": MAP,
                "image": [picture(150, 90), picture(90, 150)],
                "num_inference_steps": 3,
                "seed": 6,
                **TRUE_CFG,
            },
            variant="zero_cond_t",
        ),
        Case(
            "two prompts, n=2",
            {"prompt": [CAT, MAP], "image": picture(90, 100), "n": 2, "num_inference_steps": 2, "seed": 9},
        ),
        Case(
            "a megapixel",
            {"prompt": CAT, "image": picture(90, 150), "num_inference_steps": 2},
            slow=True,
            patched=False,
        ),
    ),
    patch=patch_areas,
    load_reference=load_reference("QwenImageEditPlusPipeline"),
    difference=UNPLACED,
    silent={"guidance_scale": NO_EMBEDDED_GUIDANCE, "max_sequence_length": "prompts that go with images are not cut"},
    default_size=unknown_size,
    one_at_a_time=True,
)

LAYERED = Recipe(
    "QwenImageLayeredPipeline",
    build("QwenImageLayeredPipeline"),
    cases=(
        Case(
            "two layers, true CFG",
            {
                "prompt": CAT,
                "image": picture(150, 90, "RGBA"),
                "layers": 2,
                "num_inference_steps": 4,
                **TRUE_CFG,
            },
        ),
        Case(
            "four layers, long prompt",
            {"prompt": MAP, "image": picture(61, 87, "RGBA"), "num_inference_steps": 3, "seed": 2},
        ),
        Case(
            "caption in English",
            {
                "image": picture(70, 110, "RGBA"),
                "prompt": " ",
                "use_en_prompt": True,
                "layers": 2,
                "num_inference_steps": 2,
            },
        ),
        Case(
            "one layer, normalised CFG, resolution 1024",
            {
                "prompt": CAT,
                "image": picture(100, 100, "RGBA"),
                "layers": 1,
                "cfg_normalize": True,
                "resolution": 1024,
                "num_inference_steps": 3,
                **TRUE_CFG,
            },
        ),
        Case(
            "caption in Chinese",
            {"image": picture(90, 100, "RGBA"), "prompt": "", "layers": 2, "num_inference_steps": 2, "seed": 7},
        ),
        Case(
            "two prompts, n=2",
            {
                "prompt": [CAT, MAP],
                "image": picture(120, 90, "RGBA"),
                "layers": 2,
                "n": 2,
                "num_inference_steps": 2,
                "seed": 9,
            },
        ),
    ),
    patch=patch_areas,
    not_in_signature=frozenset({"height", "width", "prompt"}),
    text_encoders=("text_encoder.model",),
    load_reference=load_reference("QwenImageLayeredPipeline"),
    silent={"guidance_scale": NO_EMBEDDED_GUIDANCE},
    default_size=unknown_size,
    one_at_a_time=True,
)

RECIPES = (QWEN_IMAGE, EDIT, EDIT_PLUS, LAYERED)
