"""Components that are not the model's own: of what they may be, what is looked at in them, and what comes of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from huggingface_hub import constants
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from safelight import DiffusionGenerator
from safelight.errors import InvalidParameterError, ModelError, ModelIndexError
from safelight.loading.elsewhere import found_elsewhere
from safelight.loading.repository import open_repository
from safelight.testing.recipes import shake
from safelight.testing.tokenizers import clip_tokenizer
from tests.backends import builders
from tests.loading.conftest import edit_json
from tests.loading.local_hub import Repo, serve

FIELDS: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3}


def build_prior(folder):
    """Save the first of two repositories: a text becomes an image's embedding."""
    clip = clip_tokenizer(folder / "tokenizer", 77)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"projection_dim": 32, "vocab_size": len(clip), "max_position_embeddings": 77}
    text |= {name: getattr(clip, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    prior.clip_std.data.fill_(1.0)
    diffusers.KandinskyV22PriorPipeline(
        prior=shake(prior, 1),
        image_encoder=shake(CLIPVisionModelWithProjection(CLIPVisionConfig(**builders.VISION)), 2),
        text_encoder=shake(CLIPTextModelWithProjection(CLIPTextConfig(**text)), 3),
        tokenizer=clip,
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0),
        image_processor=CLIPImageProcessorPil(size=30, crop_size=30),
    ).save_pretrained(folder)


def build_decoder(folder):
    """Save the second of two repositories: an embedding becomes a picture."""
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    diffusers.KandinskyV22Pipeline(
        unet=shake(unet, 4), movq=shake(movq, 5), scheduler=DDPMScheduler(prediction_type="epsilon")
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return the folders of a prior and of a decoder, as they are published: each with an index of its own."""
    folders = [tmp_path_factory.mktemp(name) for name in ("prior", "decoder")]
    torch.manual_seed(0)
    build_prior(folders[0])
    build_decoder(folders[1])
    return folders


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_two_repositories_are_one_pipeline(two, seed):
    prior, decoder = two
    settings: dict[str, Any] = {"pipeline": "KandinskyV22CombinedPipeline", "component": {"prior_*": str(prior)}}
    with DiffusionGenerator.from_pretrained(decoder, device="cpu", **settings) as generator:
        tasks = generator.schema.json_schema()["x-pipelines"]
        made = generator.generate("a cat", seed=seed, output_type="np", **FIELDS).images
        other = generator.generate("two dogs", seed=seed, output_type="np", **FIELDS).images
    first = diffusers.KandinskyV22PriorPipeline.from_pretrained(prior).components
    second = diffusers.KandinskyV22Pipeline.from_pretrained(decoder).components
    parts = {**second, **{f"prior_{name}": part for name, part in first.items()}}
    pipe = diffusers.KandinskyV22CombinedPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe("a cat", generator=torch.Generator().manual_seed(seed), output_type="np", **FIELDS).images
    assert np.array_equal(made, wanted) and not np.array_equal(made, other)
    assert [task["pipeline"] for task in tasks][1:] == [
        "KandinskyV22Img2ImgCombinedPipeline",
        "KandinskyV22InpaintCombinedPipeline",
    ]


def test_a_class_whose_second_repository_lacks_says_how_it_is_given(two):
    with pytest.raises(InvalidParameterError, match=r"component adds them, as prior_\*=PATH_OR_ID"):
        open_repository(two[1], pipeline="KandinskyV22CombinedPipeline")


@pytest.mark.slow
def test_a_readme_sends_nobody_elsewhere(two, tmp_path, monkeypatch):
    """The package would load what a model's README names as its prior: from any folder, ungated."""
    prior, decoder = two
    folder = shutil.copytree(decoder, tmp_path / "model")
    (folder / "README.md").write_text(f"---\nprior:\n- {tmp_path / 'evil'}\n---\n")
    opened: list[Any] = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", classmethod(_noting(opened)))
    settings: dict[str, Any] = {"pipeline": "KandinskyV22CombinedPipeline", "component": {"prior_*": str(prior)}}
    with DiffusionGenerator.from_pretrained(folder, device="cpu", **settings):
        assert {str(path) for path in opened} == {str(folder)}


def _noting(opened):
    load_config = diffusers.DiffusionPipeline.load_config.__func__

    def noted(cls, path, *args, **kwargs):
        opened.append(path)
        return load_config(cls, path, *args, **kwargs)

    return noted


@pytest.fixture
def model(checkpoints, tmp_path):
    return checkpoints.copy(tmp_path / "model")


@pytest.mark.slow
def test_a_component_instead_of_the_models_own(model, tmp_path, checkpoints):
    """Of a family's pipeline, and of the package's, from a folder of its own or from another model's."""
    other = checkpoints.copy(tmp_path / "other", "schnell")
    vae: Any = diffusers.AutoencoderKL.from_pretrained(other / "vae")
    shake(vae, 99)
    vae.save_pretrained(other / "vae")
    for backend in ("native", "diffusers"):
        pictures = []
        for component in ({}, {"vae": str(other)}, {"vae": str(other / "vae")}):
            settings: dict[str, Any] = {"backend": backend, "component": component}
            with DiffusionGenerator.from_pretrained(model, device="cpu", **settings) as generator:
                pictures.append(generator.generate("a cat", seed=0, output_type="np", **FIELDS).images)
        assert np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[0], pictures[1]), backend


def test_it_passes_the_same_gate(model, tmp_path):
    folder = shutil.copytree(model / "vae", tmp_path / "vae")
    edit_json(folder / "config.json", sample_size=1 << 40)
    with pytest.raises(ModelIndexError, match=r"vae/config.json: sample_size"):
        open_repository(model, component={"vae": str(folder)})
    shutil.rmtree(folder)
    folder = shutil.copytree(model / "vae", tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    with pytest.raises(ModelError, match="a link that leaves"):
        open_repository(model, component={"vae": str(folder)})


def test_a_class_that_is_no_component_is_refused(model, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
    for component in ("vae", "image_encoder"):
        with pytest.raises(ModelError, match=f"{component}.*refused|class 'DiffusionPipeline' is not supported"):
            DiffusionGenerator.from_pretrained(
                model, device="cpu", backend="diffusers", component={component: str(folder)}
            )


def test_what_names_no_class_or_is_no_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelIndexError, match=r"vae: config.json names no class; it takes one of _class_name"):
        found_elsewhere("vae", str(tmp_path), True, None)
    with pytest.raises(InvalidParameterError, match=r"component\['vae'\]"):
        found_elsewhere("vae", str(tmp_path / "config.json"), True, None)
    with pytest.raises(InvalidParameterError, match="a name of a component"):
        found_elsewhere("../vae", str(tmp_path), True, None)


@pytest.fixture
def hub(checkpoints, tmp_path, monkeypatch):
    server, hub = serve()
    whole, alone = checkpoints.copy(tmp_path / "hub" / "whole"), tmp_path / "hub" / "alone"
    shutil.copytree(whole / "vae", alone)
    for name in ("README.md", "model.py", "diffusion_pytorch_model.fp16.safetensors", "pytorch_model.bin"):
        (alone / name).write_bytes(b"not for us")
    hub.repos = {"studio/whole": Repo({"main": whole}), "studio/alone": Repo({"main": alone})}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_a_component_or_a_model_with_one(hub, model, monkeypatch):
    names = {"config.json", "diffusion_pytorch_model.safetensors"}
    (alone,) = found_elsewhere("vae", "studio/alone@main", True, None).values()
    assert {path.name for path in alone.folder.iterdir()} == names and alone.entry == ("diffusers", "AutoencoderKL")
    (whole,) = found_elsewhere("vae", "studio/whole", True, None).values()
    assert {path.name for path in whole.folder.iterdir()} == names
    assert {path.name for path in whole.folder.parent.iterdir()} == {"model_index.json", "vae"}
    repository = open_repository(model, component={"vae": "studio/alone"})
    assert repository.folder("vae") == alone.folder and repository.folder("transformer") == model / "transformer"
    every = found_elsewhere("prior_*", "studio/whole", False, None)
    assert {"prior_vae", "prior_tokenizer", "prior_transformer"} <= every.keys()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found_elsewhere("vae", "studio/alone", True, None)["vae"].folder == alone.folder
    with pytest.raises(ModelError, match="studio/nothing"):
        found_elsewhere("vae", "studio/nothing", True, None)
