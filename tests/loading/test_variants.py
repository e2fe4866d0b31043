"""Variants of weights: which there are, which is read, and that it is what Diffusers reads."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight import DiffusionGenerator, ServerArgs
from safelight.errors import CheckpointError, InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.loading.variants import choose_variant, heads, kept, own_variant, variants_in
from tests.backends import builders
from tests.loading.shards import STEMS, index_of, shard, weights

FILES = {
    "model.safetensors": None,
    "diffusion_pytorch_model.safetensors": None,
    "model.safetensors.index.json": None,
    "model.fp16.safetensors": "fp16",
    "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    "model.safetensors.index.fp16.json": "fp16",
    "diffusion_pytorch_model.safetensors.fp16.index.json": "fp16",
}
NO_WEIGHTS = (
    "config.json",
    "pytorch_model.bin",
    "pytorch_model.fp16.bin",
    "model.fp16-00001-of-00002.safetensors",
    "model-00001-of-00002.safetensors",
    "flux1-dev.safetensors",
    "model.a.b.safetensors",
    "model.safetensors.index.fp16.json.bak",
)


@pytest.mark.parametrize(("name", "variant"), FILES.items())
def test_what_a_file_is_a_variant_of(name, variant):
    assert variants_in([name, "config.json"]) == {variant}


def test_other_files_are_no_checkpoints_of_their_own():
    assert variants_in(NO_WEIGHTS) == set()


def test_the_file_that_is_read_by_is_among_the_variants():
    for variant in (None, "fp16", "non_ema"):
        for name in heads("model", variant):
            assert variants_in([name]) == {variant}


PLAIN, FP16, BF16 = "model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"


@pytest.mark.parametrize(
    ("components", "asked", "chosen"),
    [
        ({"a": [PLAIN], "b": [PLAIN, FP16]}, None, None),
        ({"a": [FP16], "b": [FP16]}, None, "fp16"),
        ({"a": [FP16], "b": [PLAIN, FP16], "c": ["x.json"]}, None, "fp16"),
        ({"a": [FP16], "b": [PLAIN]}, None, "fp16"),
        ({"a": [FP16, BF16], "b": [FP16]}, None, "fp16"),
        ({"a": [PLAIN], "b": [PLAIN, FP16]}, "fp16", "fp16"),
        ({"a": ["x.json"]}, None, None),
    ],
)
def test_the_choice(components, asked, chosen):
    assert choose_variant(components, asked) == chosen


@pytest.mark.parametrize(
    ("components", "asked", "words"),
    [
        ({"a": [FP16, BF16]}, None, "bf16 or fp16: a has no weights without one"),
        ({"a": [FP16], "b": [BF16]}, None, "bf16 or fp16"),
        ({"a": [PLAIN, FP16]}, "bf16", "variant: got 'bf16'; it takes fp16"),
        ({"a": [PLAIN]}, "fp16", "this model has no variants"),
        ({"a": [PLAIN]}, "../fp16", "this model has no variants"),
    ],
)
def test_no_choice(components, asked, words):
    with pytest.raises(InvalidParameterError, match=words):
        choose_variant(components, asked)


def test_what_is_kept_of_a_folder():
    names = [*FILES, *NO_WEIGHTS]
    for chosen in (None, "fp16", "non_ema"):
        paths = kept({"a": names, "b": [PLAIN, FP16]}, chosen)
        own = {path.partition("/")[2] for path in paths if path.startswith("a/") and not path.endswith(".bin")}
        assert {name for name in own if name in FILES} == {name for name in FILES if FILES[name] == chosen}
        assert ("b/" + (FP16 if chosen == "fp16" else PLAIN)) in paths
        assert ("a/model.fp16-00001-of-00002.safetensors" in paths) is (chosen == "fp16")
    assert own_variant([PLAIN], "fp16") is None


def as_variant(folder, component, variant, change=0.0, keep=False, sharded=None):
    """Make a component's weights a variant, and return its weights; `sharded` is None, or which names shards have."""
    path, stem = weights(folder, component), STEMS[component]
    tensors = load_file(path)
    changed = {key: tensor + change if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    if sharded is None:
        save_file(changed, path.with_name(f"{stem}.{variant}.safetensors"), metadata={"format": "pt"})
    else:
        whole = path.read_bytes()
        save_file(changed, path, metadata={"format": "pt"})
        index = index_of(folder, component)
        names = shard(folder, component)
        content = json.loads(index.read_text())
        index.unlink()
        for number, name in enumerate(names, 1):
            tail = f"0000{number}-of-00002"
            new = f"{stem}.{variant}-{tail}.safetensors" if sharded == "new" else f"{stem}-{tail}.{variant}.safetensors"
            (folder / component / name).rename(folder / component / new)
            content["weight_map"] = {k: new if v == name else v for k, v in content["weight_map"].items()}
        place = f"index.{variant}" if sharded == "new" else f"{variant}.index"
        index.with_name(f"{stem}.safetensors.{place}.json").write_text(json.dumps(content))
        path.write_bytes(whole)
    if not keep:
        path.unlink()
    return changed


def load(folder, **settings):
    return load_pipeline(ServerArgs(str(folder), device="cpu", **settings))


def assert_weights(module, expected):
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


@pytest.mark.filterwarnings("ignore:This serialization format is now deprecated")
@pytest.mark.parametrize("sharded", [None, "new", "old"])
def test_the_only_variant_is_read_by_itself(checkpoints, damaged, sharded):
    """The older names of shards are those that diffusers alone wrote."""
    for component, stem in STEMS.items():
        as_variant(damaged, component, "fp16", sharded=None if sharded == "old" and stem == "model" else sharded)
    assert open_repository(damaged).variant == "fp16"
    found, reference = load(damaged), load(checkpoints.folder())
    for component in STEMS:
        assert_weights(found.get_module(component), reference.get_module(component).state_dict())


@pytest.mark.parametrize("component", STEMS)
def test_one_component_with_a_variant_alone(checkpoints, damaged, component):
    as_variant(damaged, component, "fp16")
    assert_weights(load(damaged).get_module(component), load(checkpoints.folder()).get_module(component).state_dict())


@pytest.mark.parametrize("asked", [None, "fp16", "bf16"])
def test_of_several_the_one_that_is_asked_for(damaged, asked):
    """As in Diffusers: of components that have it; the transformer has all, the text encoder none, the VAE one."""
    changes = {"fp16": 0.25, "bf16": 0.5}
    for variant, change in changes.items():
        as_variant(damaged, "transformer", variant, change, keep=True)
    as_variant(damaged, "vae", "fp16", 0.25, keep=True)
    found = load(damaged, variant=asked)
    reference = diffusers.FluxPipeline.from_pretrained(damaged, variant=asked)
    for component in STEMS:
        assert_weights(found.get_module(component), getattr(reference, component).state_dict())
    plain = load_file(weights(damaged, "transformer"))
    key = "x_embedder.weight"
    assert torch.equal(found.get_module("transformer").state_dict()[key], plain[key] + changes.get(asked, 0.0))


def test_several_to_choose_from_are_named(damaged):
    as_variant(damaged, "transformer", "fp16", keep=True)
    as_variant(damaged, "transformer", "bf16")
    with pytest.raises(InvalidParameterError, match=r"variant: .*bf16 or fp16: transformer"):
        load(damaged)
    load(damaged, variant="bf16")
    with pytest.raises(InvalidParameterError, match="variant: got 'fp8'; it takes bf16 or fp16"):
        load(damaged, variant="fp8")


def test_a_component_without_what_was_asked_for(damaged):
    as_variant(damaged, "transformer", "fp16")
    as_variant(damaged, "vae", "bf16")
    with pytest.raises(CheckpointError, match=r"vae: no weights there \(diffusion_pytorch_model.safetensors\)"):
        load(damaged, variant="fp16")


def test_a_damaged_variant_is_refused_by_name(damaged):
    as_variant(damaged, "vae", "fp16")
    path = damaged / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model.fp16.safetensors: not a whole"):
        load(damaged)


def test_a_variants_index_names_only_safetensors_beside_it(damaged):
    as_variant(damaged, "vae", "fp16", sharded="new")
    index = damaged / "vae" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(index.read_text().replace("diffusion_pytorch_model.fp16-00001-of", "../x-00001-of"))
    with pytest.raises(CheckpointError, match="is refused; a shard is a safetensors file beside the index"):
        load(damaged)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "v1.5"
    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(**builders.stable_diffusion(folder)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
@pytest.mark.parametrize("asked", [None, "fp16"])
def test_through_the_diffusers_package(stable_diffusion, tmp_path, shard_size, asked):
    """What its own `save_pretrained` writes of a variant, whole and in shards, and the pictures that it makes of it."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipe.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=shard_size)
    names = {path.name for path in (tmp_path / "model" / "unet").iterdir()}
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) is (shard_size == "60KB")
    assert not list((tmp_path / "model").rglob("*model.safetensors"))
    fields = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1}
    made = []
    for folder, variant in ((tmp_path / "model", asked), (stable_diffusion, None)):
        with DiffusionGenerator.from_pretrained(folder, device="cpu", variant=variant) as generator:
            made.append(generator.generate("a cat", **fields).images[0].tobytes())
    assert made[0] == made[1]
    shutil.copytree(stable_diffusion, tmp_path / "model", dirs_exist_ok=True)
    assert open_repository(tmp_path / "model").variant is None
