"""What a transformer's configuration allows runs as the reference does, or is refused when the model is loaded.

Every combination of the fields that change a branch is built once, tiny. What the reference cannot run must be refused,
by a named error, before a request could meet it; what it runs is compared, unless a rule below says why it is refused.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.errors import ModelIndexError
from safelight.families.flux.transformer import FluxArchitecture
from safelight.families.qwen_image.transformer import QwenImageArchitecture
from safelight.families.wan.transformer import WanArchitecture
from safelight.loading.loader import load_pipeline
from safelight.testing.models import requests, run_alone
from safelight.testing.recipes import shake
from safelight.testing.reference import distance
from safelight.testing.suites import Suite
from tests.recipes import all_recipes, flux, qwen_image, wan

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Axes:
    """What is built of one pipeline class.

    Attributes:
        values: of the fields that change a branch; all combinations are built.
        odd: more values, each beside the recipe's own fields alone: that do not go with the rest, or with each other.
        fields: of the request.
        variant: of the recipe's checkpoint.
        images: `last` where a transformer of positions of two images is given a last one too.
        refused: says why a combination is refused that the reference runs; None where it is not.
    """

    values: Mapping[str, tuple[Any, ...]]
    fields: Mapping[str, Any]
    odd: tuple[Mapping[str, Any], ...] = ()
    variant: str = "default"
    images: str = ""
    refused: Callable[[Mapping[str, Any]], str | None] = lambda config: None


SMALL = {"prompt": "a photo of a cat", "num_inference_steps": 2, "seed": 3}
PICTURE = {**SMALL, "height": 32, "width": 48}
CLIP = {**SMALL, "height": 64, "width": 32, "num_frames": 5, "negative_prompt": "blurry"}
EDIT = {**SMALL, "image": qwen_image.picture(90, 60), **qwen_image.TRUE_CFG}
FLUX_ODD = (
    {"patch_size": 2},
    {"patch_size": 2, "out_channels": 4},
    {"out_channels": 8},
    {"in_channels": 12},
    {"axes_dims_rope": (4, 6, 4)},
    {"axes_dims_rope": (8, 8)},
    {"axes_dims_rope": (3, 7, 6)},
    {"joint_attention_dim": 24},
    {"pooled_projection_dim": 24},
)
QWEN_ODD = (
    {"patch_size": 1, "out_channels": 24},
    {"patch_size": 1, "out_channels": None},
    {"out_channels": None},
    {"patch_size": 1},
    {"in_channels": 16},
    {"axes_dims_rope": (4, 6, 4)},
    {"axes_dims_rope": (4, 4, 4, 4)},
    {"axes_dims_rope": (3, 7, 6)},
    {"joint_attention_dim": 24},
    {"guidance_embeds": True},
)
SWITCHES = dict.fromkeys(("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), (False, True))
WAN_VALUES = {
    "cross_attn_norm": (True, False),
    "image_dim": (None, wan.CLIP_DIM),
    "added_kv_proj_dim": (None, 32),
    "pos_embed_seq_len": (None, 10),
}
WAN_ODD = (
    {"patch_size": (1, 1, 1)},
    {"patch_size": (1, 4, 4)},
    {"patch_size": (2, 2, 2)},
    {"patch_size": (1, 2, 1)},
    {"out_channels": None},
    {"out_channels": 5},
    {"in_channels": 5},
    {"freq_dim": 15},
    {"qk_norm": "rms_norm"},
    {"text_dim": 20},
    {"image_dim": 16},
    {"rope_max_seq_len": 4},
)


def layered_refused(config):
    return "layers would be steered as at time 0" if config["zero_cond_t"] else None


def wan_refused(config):
    if config["qk_norm"] != "rms_norm_across_heads":
        return "the reference norms across heads, whatever is written there"
    if config["freq_dim"] % 2:
        return "no model has an odd number of sinusoids"
    frames, rows, columns = config["patch_size"]
    return None if frames == 1 and rows == columns else "a token is a square of one frame"


AXES = {
    "FluxPipeline": Axes(
        {"guidance_embeds": (False, True), "num_layers": (0, 2), "num_single_layers": (0, 2)}, PICTURE, FLUX_ODD
    ),
    "FluxKontextPipeline": Axes(
        {"guidance_embeds": (False, True)},
        {**PICTURE, "image": flux.photo(40, 30), "max_area": 32 * 48, **flux.TRUE_CFG},
        FLUX_ODD,
    ),
    "QwenImagePipeline": Axes(SWITCHES, {**PICTURE, **qwen_image.TRUE_CFG}, QWEN_ODD),
    "QwenImageEditPipeline": Axes(SWITCHES, EDIT, QWEN_ODD),
    "QwenImageEditPlusPipeline": Axes(
        SWITCHES, {**EDIT, "image": [qwen_image.picture(90, 60), qwen_image.picture(40, 60)]}, QWEN_ODD
    ),
    "QwenImageLayeredPipeline": Axes(
        SWITCHES,
        {**SMALL, "image": qwen_image.picture(90, 60, "RGBA"), "layers": 2, **qwen_image.TRUE_CFG},
        QWEN_ODD,
        refused=layered_refused,
    ),
    "WanPipeline": Axes(WAN_VALUES, CLIP, WAN_ODD, refused=wan_refused),
    "WanImageToVideoPipeline": Axes(
        WAN_VALUES, {**CLIP, "image": flux.photo(40, 30)}, WAN_ODD, images="first and last", refused=wan_refused
    ),
    "WanDMDPipeline": Axes(
        WAN_VALUES,
        {name: value for name, value in CLIP.items() if name not in ("negative_prompt", "num_inference_steps")},
        WAN_ODD,
        refused=wan_refused,
    ),
}
ARCHITECTURES = {"Flux": FluxArchitecture, "Qwen": QwenImageArchitecture, "Wan": WanArchitecture}
SIZES = {
    "Flux": {"attention_head_dim", "num_attention_heads"},
    "Qwen": {"num_layers", "attention_head_dim", "num_attention_heads", "pooled_projection_dim"},
    "Wan": {"num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "eps"},
}
"""Fields that are numbers alone: every recipe has one that is not the default."""

GAINS = {
    "FluxTransformer2DModel": flux.TRANSFORMER_GAINS,
    "QwenImageTransformer2DModel": qwen_image.TRANSFORMER_GAINS,
    "WanTransformer3DModel": wan.TRANSFORMER_GAINS,
}


def combinations(axes):
    """Return all combinations of the values."""
    return [dict(zip(axes.values, values, strict=True)) for values in itertools.product(*axes.values.values())]


def test_every_field_of_an_architecture_is_varied_or_a_number():
    for family, architecture in ARCHITECTURES.items():
        varied = {
            name
            for pipeline_name, axes in AXES.items()
            if pipeline_name.startswith(family)
            for combination in (*combinations(axes), *axes.odd)
            for name in combination
        }
        assert {field.name for field in dataclasses.fields(architecture)} == varied | SIZES[family]
    assert AXES.keys() == all_recipes().keys()


def rebuilt(own, folder, target, changes):
    """Write a copy of a repository with another transformer; return its configuration, and the reference's module.

    Where the reference makes no such module, that is None, and the weights are those of before.
    """
    config = {**{name: value for name, value in own.config.items() if not name.startswith("_")}, **changes}
    shutil.copytree(folder, target)
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    torch.manual_seed(0)
    kind: Any = type(own)
    try:
        made = kind(**config)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return config, None
    names = [name for name, _ in made.named_parameters()]
    gains = {pattern: gain for pattern, gain in GAINS[kind.__name__].items() if fnmatch.filter(names, pattern)}
    shake(made, 4, gains=gains)
    made.save_pretrained(target / "transformer")
    return config, made


def run_reference(reference, recipe, made, fields):
    """Return what the reference makes with a transformer; None where it cannot."""
    distilled = isinstance(reference, wan.DMDReference)
    pipe = reference.pipe if distilled else reference
    own, pipe.transformer = pipe.transformer, made
    given = {recipe.to_diffusers.get(name, name): value for name, value in fields.items() if name != "seed"}
    given["generator"] = torch.Generator().manual_seed(fields["seed"])
    if distilled:
        given |= {"prompt": [given["prompt"]], "generator": [given["generator"]]}
    try:
        pixels = reference(**given, callback_on_step_end=lambda *args: args[3], output_type="np", return_dict=False)[0]
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        pipe.transformer = own
    pixels = np.asarray(pixels[0])
    return pixels if np.isfinite(pixels).all() else None


def fault(axes, recipe, config, folder, reference, made):
    """Return what is wrong with how an architecture is taken; None if nothing is."""
    first_and_last = "last" in axes.images and None not in (config["image_dim"], config["pos_embed_seq_len"])
    fields = {**axes.fields, **({"last_image": flux.photo(30, 40)} if first_and_last else {})}
    expected = None if made is None else run_reference(reference, recipe, made, fields)
    try:
        ours = load_pipeline(ServerArgs(str(folder), device="cpu"))
    except ModelIndexError as error:
        return None if expected is None or axes.refused(config) else f"refused, and the reference runs it: {error}"
    if expected is None:
        return "loaded, and the reference cannot run it"
    (req,) = requests(ours, fields)
    run_alone(ours, req)
    difference = distance(req, expected)
    return None if difference <= TOLERANCE else f"differs by {difference:.1e}"


class TestArchitectures(Suite):
    recipes = tuple(all_recipes().values())
    # Pipelines of a family that is in `make test` with another.
    slow_recipes: ClassVar = {
        "test_an_architecture_runs_as_in_the_reference_or_is_refused": (
            "FluxKontextPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
            "WanPipeline",
            "WanDMDPipeline",
        )
    }

    @pytest.mark.parametrize("part", ["branches", "odd"])
    def test_an_architecture_runs_as_in_the_reference_or_is_refused(self, recipe, part, tiny_models, tmp_path):
        axes = AXES[recipe.pipeline_name]
        folder, reference = tiny_models.folder(recipe, axes.variant), tiny_models.reference(recipe, axes.variant)
        own = (reference.pipe if isinstance(reference, wan.DMDReference) else reference).transformer
        faults = {}
        for number, changes in enumerate(combinations(axes) if part == "branches" else axes.odd):
            config, made = rebuilt(own, folder, tmp_path / str(number), changes)
            faults[str(changes)] = fault(axes, recipe, config, tmp_path / str(number), reference, made)
        assert {changes: what for changes, what in faults.items() if what is not None} == {}


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer_2", {"image_dim": wan.CLIP_DIM}, "transformer_2/config.json: image_dim: got 20"),
        ("transformer_2", {"patch_size": [1, 1, 1]}, r"transformer_2/config.json: patch_size: got \[1, 1, 1\]"),
        ("transformer_2", {"attention_head_dim": 8}, "transformer_2/config.json: attention_head_dim: got 8"),
        ("transformer", {"in_channels": 4}, r"transformer/config.json: in_channels: got 4; .* takes 12"),
        ("transformer", {"image_dim": wan.CLIP_DIM}, "image_encoder is null, and the transformer's image_dim needs it"),
    ],
)
def test_transformers_of_two_stages_fit_each_other_and_the_rest(tiny_models, tmp_path, component, changes, message):
    """Where one would be given what was made for the other."""
    folder = shutil.copytree(tiny_models.folder(wan.IMAGE_TO_VIDEO, "2.2"), tmp_path / "model")
    names = {component} if component == "transformer_2" or "in_channels" in changes else {component, "transformer_2"}
    for name in names:
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelIndexError, match=message):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_text_to_video_leaves_an_embedding_of_images_alone(tiny_models, tmp_path):
    """`image_dim` in a transformer that is given no images: its weights are loaded, and nothing uses them."""
    reference = tiny_models.reference(wan.WAN)
    config, made = rebuilt(reference.transformer, tiny_models.folder(wan.WAN), tmp_path / "model", {"image_dim": 20})
    assert fault(AXES["WanPipeline"], wan.WAN, config, tmp_path / "model", reference, made) is None
