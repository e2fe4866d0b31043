"""What is Wan's own: two transformers, first and last images, given timesteps, and a decoder that walks frames."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from safelight import ServerArgs
from safelight.core.request import map_tensors
from safelight.errors import InvalidParameterError, ModelIndexError, UnknownParameterError
from safelight.families.wan.config import cleaned
from safelight.layers.causal_vae import CausalDecoder
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.stages.schedule import shifted_sigmas
from safelight.testing.models import requests, run_alone
from safelight.testing.recipes import shake
from tests.acceleration.memories import HostMemory
from tests.recipes.flux import photo
from tests.recipes.wan import BROKEN, DMD, IMAGE_TO_VIDEO, SMALL, WAN, vae


def test_the_transformer_not_in_use_waits_on_the_host(tiny_models, tmp_path):
    """The bytes are those of both being on the device, and each is brought there once."""
    folder = tiny_models.folder(WAN, "2.2")
    args = ServerArgs(str(folder), device="cpu", dtype="float32", offload="alternates", memory_limit="8GiB")
    waiting = load_pipeline(args, HostMemory())
    fields = {"prompt": "a cat", **SMALL, "num_inference_steps": 4}
    first, second = (
        run_alone(pipeline, requests(pipeline, fields)[0]) for pipeline in (tiny_models.ours(WAN, "2.2"), waiting)
    )
    assert torch.equal(first, second)
    assert waiting.residency.num_swaps == 2
    with pytest.raises(InvalidParameterError, match="offload"):
        load_pipeline(dataclasses.replace(args, model=str(tiny_models.folder(WAN))), HostMemory())


@pytest.mark.parametrize("seed", [0, 5])
def test_text_to_video_may_be_given_its_first_frame(tiny_models, tmp_path, seed):
    """Where frames have timesteps of their own: the same as the pipeline that is held to Diffusers for it."""
    folder = shutil.copytree(tiny_models.folder(IMAGE_TO_VIDEO, "ti2v"), tmp_path / "ti2v")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipeline"}))
    fields = {"prompt": "a cat", **SMALL, "height": 64, "width": 96, "image": (photo(40, 30),), "seed": seed}
    ours, held = load_pipeline(ServerArgs(str(folder), device="cpu")), tiny_models.ours(IMAGE_TO_VIDEO, "ti2v")
    given, same = (run_alone(pipeline, requests(pipeline, fields)[0]) for pipeline in (ours, held))
    assert torch.equal(given, same)
    without = run_alone(ours, requests(ours, {**fields, "image": None})[0])
    assert not torch.equal(given, without)
    assert refused(tiny_models.ours(WAN).schema, image=[photo(8, 8)])[0] == "image"


def refused(schema, **fields):
    """Return the field that a request is refused for, and what is said of it."""
    with pytest.raises(InvalidParameterError) as caught:
        prepare(schema, {"prompt": "a cat", **SMALL, **fields})
    return caught.value.param, str(caught.value)


def test_a_second_guidance_scale_needs_a_second_transformer(tiny_models):
    assert refused(tiny_models.ours(WAN).schema, guidance_scale_2=3.0)[0] == "guidance_scale_2"
    prepare(tiny_models.ours(WAN, "2.2").schema, {"prompt": "a cat", **SMALL, "guidance_scale_2": 3.0})


@pytest.mark.parametrize(
    ("variant", "images", "last", "field"),
    [
        ("2.2", 0, 0, "image"),
        ("2.2", 2, 0, "image"),
        ("2.2", 1, 1, None),
        ("default", 1, 1, "last_image"),
        ("default", 1, 0, None),
        ("last image", 1, 0, "last_image"),
        ("last image", 1, 1, None),
        ("ti2v", 1, 1, "last_image"),
    ],
)
def test_each_model_takes_its_images(tiny_models, variant, images, last, field):
    schema = tiny_models.ours(IMAGE_TO_VIDEO, variant).schema
    asked = {
        "image": [photo(40, 30)] * images,
        **({"last_image": photo(30, 40)} if last else {}),
        "height": 64,
        "width": 96,
    }
    if field is not None:
        assert refused(schema, **asked)[0] == field
    else:
        prepare(schema, {"prompt": "a cat", **SMALL, **asked})


def test_one_frame_has_no_last_image(tiny_models):
    schema = tiny_models.ours(IMAGE_TO_VIDEO, "2.2").schema
    assert refused(schema, image=photo(8, 8), last_image=photo(8, 8), num_frames=1)[0] == "last_image"


def test_a_last_image_is_opened_like_the_first(tiny_models, tmp_path):
    schema = tiny_models.ours(IMAGE_TO_VIDEO, "2.2").schema
    photo(30, 40).save(tmp_path / "last.png")
    params, _ = prepare(schema, {"prompt": "a cat", **SMALL, "image": photo(8, 8), "last_image": tmp_path / "last.png"})
    assert vars(params)["last_image"].size == (30, 40)
    assert refused(schema, image=photo(8, 8), last_image=tmp_path / "none.png")[0] == "last_image"


def test_the_model_of_sixteenfold_compression_has_24_frames_a_second(tiny_models):
    assert tiny_models.ours(WAN, "ti2v").schema.defaults["fps"] == 24
    assert tiny_models.ours(WAN).schema.defaults["fps"] == 16
    assert refused(tiny_models.ours(WAN, "ti2v").schema)[1].startswith("height: got 48; it takes a multiple of 32")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"transformer": [None, None]}, "transformer"),
        ({"boundary_ratio": 0.9}, "transformer_2"),
        ({"boundary_ratio": 1.0, "transformer": [None, None]}, "transformer_2"),
    ],
)
def test_a_null_transformer_that_a_step_needs_is_refused(tiny_models, tmp_path, changes, missing):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models.folder(WAN), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(ModelIndexError, match=f"{missing} is null"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_a_distilled_model_takes_falling_timesteps_and_no_guidance(tiny_models):
    schema = tiny_models.ours(DMD).schema
    fields = {"num_inference_steps": None}
    assert schema.defaults["timesteps"] == (1000.0, 757.0, 522.0)
    assert refused(schema, **fields, timesteps=[500, 757])[0] == "timesteps"
    assert refused(schema, **fields, timesteps=[757, 757])[0] == "timesteps"
    assert refused(schema, num_inference_steps=4)[0] == "num_inference_steps"
    for name in ("guidance_scale", "negative_prompt"):
        with pytest.raises(UnknownParameterError, match="without guidance"):
            prepare(schema, {"prompt": "a cat", name: 1.0})


def test_noise_levels_are_the_nearest_of_the_training_schedule():
    table = FlowMatchEulerDiscreteScheduler(shift=8.0)
    asked = [1000.0, 757.0, 522.0, 3.0]
    expected = [table.sigmas[(table.timesteps - t).abs().argmin()].item() for t in asked]
    assert shifted_sigmas(asked, 8.0, 1000) == expected


MARKUP = ["&amp;", "&lt;b&gt;", "<i>", "\x00", "\x1b[1m", "\x85", "\u2028", "\ufeff", "\u00a0", "\ud83d", " \r\n"]
LETTERS = ["\ufb03", "\uff21", "\u201c", "\u2026", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "cat"]


@given(st.lists(st.sampled_from(MARKUP + LETTERS) | st.text(max_size=5)).map("".join))
@example(BROKEN)
def test_prompts_are_cleaned_as_the_reference_cleans_them(text):
    assert cleaned(text) == pipeline_wan.prompt_clean(text) == pipeline_wan_i2v.prompt_clean(text)


def test_cleaning_is_more_than_markup():
    assert cleaned(BROKEN) == 'a cat with "flowers", a café and a dog\'s field'


def test_latents_come_with_the_image_in_its_place(tiny_models):
    fields = {
        **SMALL,
        "height": 64,
        "width": 96,
        "image": photo(60, 40),
        "output_type": "latent",
        "guidance_scale": 1.0,
    }
    (req,) = requests(tiny_models.ours(IMAGE_TO_VIDEO, "ti2v"), {"prompt": "a cat", **fields})
    latents = run_alone(tiny_models.ours(IMAGE_TO_VIDEO, "ti2v"), req)
    reference = tiny_models.reference(IMAGE_TO_VIDEO, "ti2v")
    generator = torch.Generator().manual_seed(0)
    expected = reference(prompt="a cat", **fields, generator=generator, return_dict=False)[0]
    assert float((latents - expected[0]).abs().max()) < 1e-4


def test_weights_that_nothing_uses_stay_in_the_file_and_exact_ones_stay_exact(tiny_models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_models.folder(WAN), folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    more = {"blocks.0.attn2.norm_added_q.weight": torch.ones(32), "blocks.1.to_gate_compress.bias": torch.ones(32)}
    save_file({**weights, **more}, path)
    loaded = load_pipeline(ServerArgs(str(folder), device="cpu", dtype="bfloat16")).get_module("transformer")
    assert loaded.state_dict().keys() == weights.keys()
    exact = {name for name, weight in loaded.state_dict().items() if weight.dtype == torch.float32}
    parts = ("time_embedder", "scale_shift_table", "norm2")
    assert exact == {name for name in weights if any(part in name.split(".") for part in parts)}


def decoded(decoder, latents, moved=False):
    """Return what the walk makes of latents, with what it remembers moved to other memory behind each latent frame."""
    cache: dict[str, list[Any]] = {}
    frames: list[torch.Tensor] = []
    for index in range(latents.shape[2]):
        frames += decoder.decode(latents[:, :, index : index + 1], cache)
        if moved:
            cache = {name: [frame.clone() for frame in remembered] for name, remembered in cache.items()}
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("residual", [False, True], ids=["2.1", "TI2V-5B"])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_the_walk_decodes_as_the_library_does(residual, num_frames):
    torch.manual_seed(0)
    library = vae(residual)
    shake(library, 1)
    latents = torch.randn(1, library.config.z_dim, num_frames, 18, 5)
    with torch.inference_mode():
        expected = library.decode(latents, return_dict=False)[0]
        decoder = CausalDecoder(library)
        ours = decoded(decoder, latents)
        assert ours.shape == expected.shape
        assert float((ours - expected).norm() / expected.norm()) < 1e-5
        assert torch.equal(decoded(decoder, latents, moved=True), ours)
        assert torch.allclose(library.decode(latents, return_dict=False)[0], expected, atol=1e-5)


def test_the_decoder_remembers_in_the_request(tiny_models):
    pipeline = tiny_models.ours(WAN)
    (req,) = requests(pipeline, {"prompt": "a cat", **SMALL, "num_frames": 9, "num_inference_steps": 1})
    steps, sizes = pipeline.run(req), []
    with torch.inference_mode():
        sent = next(steps)
        while True:
            results = [pipeline.forward(call) for call in sent]
            try:
                sent = steps.send(results)
            except StopIteration:
                break
            given = sent[0].kwargs["state"] if sent and req.stage == "decoding" else {}
            sizes.append((req.stage, list(given), len(given.get("cache", ()))))
    assert sizes[-3][:2] == ("decoding", ["input"]), "nothing is remembered before the first latent frame"
    assert [(stage, cache > 10) for stage, _, cache in sizes[-2:]] == [("decoding", True)] * 2
    assert req.stage_state is None and req.outputs[0].shape == (9, 48, 80, 3)
    map_tensors(req, torch.clone)
