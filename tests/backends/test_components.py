"""Components through the diffusers package: of which classes, from which files, and in which precision."""

from __future__ import annotations

import json
import shutil
import typing
from typing import Any

import diffusers
import diffusers.pipelines
import numpy as np
import pytest
import torch
import transformers
from diffusers import ModelMixin
from PIL import Image

from safelight import DiffusionGenerator, ServerArgs
from safelight.backends.components import (
    RENAMED,
    checkpoint_stem,
    component_class,
    component_names,
    expected_classes,
    is_taken_apart,
    load_component,
    needed_components,
)
from safelight.backends.diffusers import has_pipeline
from safelight.errors import ModelError, ModelIndexError
from safelight.loading.loader import load_pipeline
from safelight.testing.tokenizers import qwen2_tokenizer
from tests.backends import float32_models
from tests.backends.conftest import FIELDS
from tests.loading.conftest import edit_json
from tests.recipes import flux, wan
from tests.recipes.qwen_image import EDIT, load_reference, patch_areas, place_images


def members(annotation):
    inner = typing.get_args(annotation)
    return [member for part in inner for member in members(part)] if inner else [annotation]


def model_classes():
    """Return every class of weights that a pipeline of the package names in its constructor, by its index entry."""
    found = {}
    for name in filter(has_pipeline, dir(diffusers)):
        for hint in typing.get_type_hints(getattr(diffusers, name).__init__).values():
            for cls in members(hint):
                if isinstance(cls, type) and issubclass(cls, ModelMixin | transformers.PreTrainedModel):
                    parts = cls.__module__.split(".")
                    pipelines_own = parts[:2] == ["diffusers", "pipelines"]
                    found[(parts[-2] if pipelines_own else parts[0], cls.__name__)] = cls
    return found


@pytest.mark.slow
def test_every_class_has_its_librarys_file():
    """Whatever package the index names it of: Stable Diffusion's safety checker is transformers', IF's mark is not."""
    classes = model_classes()
    assert len({library for library, _ in classes}) > 10, "single pipelines' packages are among them"
    stems: dict[str, dict[tuple[str, str], str | None]] = {"diffusers": {}, "transformers": {}}
    for (library, name), cls in classes.items():
        package = {"diffusers": diffusers, "transformers": transformers}.get(library)
        package = package or getattr(diffusers.pipelines, library, None)
        if name not in dir(package):
            continue  # not public: an index cannot name it
        resolved = component_class(library, name)
        assert resolved is not None, (library, name)
        kind = "transformers" if issubclass(cls, transformers.PreTrainedModel) else "diffusers"
        stems[kind][library, name] = checkpoint_stem(resolved)
    assert set(stems["transformers"].values()) == {"model"}
    assert set(stems["diffusers"].values()) == {"diffusion_pytorch_model"}
    assert stems["transformers"]["stable_diffusion", "StableDiffusionSafetyChecker"] == "model"


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("diffusers", "StableDiffusionPipeline"),
        ("diffusers", "logging"),
        ("diffusers", "__doc__"),
        ("transformers", "AutoModel"),
        ("transformers", "pipeline"),
        ("stable_diffusion", "torch"),
        ("os", "system"),
        ("TYPE_CHECKING", "x"),
    ],
)
def test_other_names_are_no_components(library, name):
    assert component_class(library, name) is None


def test_names_that_older_indexes_have(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    ((library, old),) = RENAMED
    edit_json(folder / "model_index.json", feature_extractor=[library, old])
    fields = {**FIELDS["StableDiffusionPipeline"], "seed": 3, "output_type": "np"}
    pictures = []
    for model in (folder, checkpoint("StableDiffusionPipeline")):
        with DiffusionGenerator.from_pretrained(model, device="cpu") as generator:
            pictures.append(generator.generate("a cat", **fields).images)
    assert np.array_equal(*pictures)


def test_entries_that_the_pipeline_does_not_take_are_left_out(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    edit_json(
        folder / "model_index.json",
        _ignore_files=["pipeline.py"],
        sizes=[9, 18, 27],
        tokenizer_9=["my_code", "Tokenizer"],
        image_encoder=[None, None],
    )
    index = json.loads((folder / "model_index.json").read_text())
    assert set(component_names("StableDiffusionPipeline", index)) == {
        "feature_extractor",
        "safety_checker",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    }
    load_pipeline(ServerArgs(str(folder), device="cpu"))


@pytest.mark.parametrize(
    "entry", [5, "vae", [], ["diffusers"], ["diffusers", 7], ["diffusers", "AutoencoderKL", "x"], {"a": 1}]
)
def test_a_malformed_entry_is_refused_by_name(checkpoint, tmp_path, entry):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    edit_json(folder / "model_index.json", vae=entry)
    with pytest.raises(ModelIndexError, match=r"model_index.json: vae: .*refused"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_the_safety_checkers_weights_go_through_the_gate(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    weights = folder / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.safetensors"))
    with pytest.raises(ModelError, match=r"safety_checker: no weights there \(model.safetensors\)"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_every_class_with_parts_in_float32_is_tried_or_said_to_be_too_large():
    names = set(float32_models.classes())
    assert len(names) > 15 and names >= {"WanTransformer3DModel", "WanVACETransformer3DModel"}
    assert names >= float32_models.TOO_LARGE.keys()


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    flux.build(folder, "default")
    return folder


@pytest.mark.parametrize("name", sorted(set(float32_models.classes()) - float32_models.TOO_LARGE.keys()))
def test_classes_with_parts_in_float32_load(flux_folder, tmp_path, name):
    """In place of another pipeline's transformer, which nothing looks at while it is loaded."""
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    shutil.rmtree(folder / "transformer")
    made: Any = float32_models.build(name)
    made.save_pretrained(folder / "transformer")
    edit_json(folder / "model_index.json", transformer=["diffusers", name])
    pipeline = load_pipeline(ServerArgs(str(folder), device="cpu", dtype="bfloat16", backend="diffusers"))
    ours = pipeline.get_module("pipeline").transformer.state_dict()
    theirs = getattr(diffusers, name).from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert {key: tensor.dtype for key, tensor in ours.items()} == {key: theirs[key].dtype for key in ours}
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert {torch.float32, torch.bfloat16} <= {tensor.dtype for tensor in ours.values()}


PROCESSORS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")


@pytest.fixture
def processor_folder(tmp_path):
    """Return a processor's folder as it is published: beside the tokenizer, settings of pictures and of videos."""
    tokenizer = qwen2_tokenizer(tmp_path / "processor")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "processor")
    transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(
        tmp_path / "processor"
    )
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"longest_edge": 9999, "shortest_edge": 99}}
    (tmp_path / "processor" / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return tmp_path / "processor"


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_of_videos_is_taken_apart(processor_folder, name):
    """Those of transformers ask for torchvision: of them the tokenizer and the image processor are used alone."""
    cls: Any = component_class("transformers", name)
    assert is_taken_apart(cls) and not is_taken_apart(component_class("transformers", "CLIPProcessor"))
    with pytest.raises(ImportError, match=r"(?i)torchvision"):
        cls.from_pretrained(processor_folder)
    processor = load_component(cls, processor_folder, torch.float32, None)
    assert isinstance(processor, cls) and processor.video_processor is None
    picture = Image.linear_gradient("L").resize((56, 28)).convert("RGB")
    text = f"a cat <|vision_start|>{processor.image_token}<|vision_end|> sat"
    made = processor(text=[text], images=[picture], return_tensors="pt")
    parts = transformers.Qwen2VLImageProcessorPil.from_pretrained(processor_folder)
    pixels = parts(images=[picture], return_tensors="pt")
    assert torch.equal(made.pixel_values, pixels.pixel_values)
    assert torch.equal(made.image_grid_thw, pixels.image_grid_thw)
    num_tokens = int(pixels.image_grid_thw.prod()) // parts.merge_size**2
    tokenizer = transformers.AutoTokenizer.from_pretrained(processor_folder)
    wanted = tokenizer(text.replace(processor.image_token, processor.image_token * num_tokens)).input_ids
    assert made.input_ids.tolist() == [wanted] and num_tokens == 2
    assert processor.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_part_of_another_class_is_refused(processor_folder, file):
    changes: dict[str, Any] = {"tokenizer_class": "Mine", "image_processor_type": "Mine"}
    edit_json(processor_folder / file, **changes, auto_map={"AutoTokenizer": "model.Mine"})
    with pytest.raises(ModelIndexError, match=r"processor: \w+: class 'Mine' is refused"):
        load_component(component_class("transformers", PROCESSORS[0]), processor_folder, torch.float32, None)


def test_a_model_with_a_processor_of_videos_runs(tmp_path, monkeypatch):
    """As Qwen-Image-Edit's index names one: the reference has the same parts, joined by hand."""
    EDIT.build(tmp_path, "default")
    patch_areas(monkeypatch)
    fields = {"image": Image.linear_gradient("L").resize((64, 48)).convert("RGB"), "num_inference_steps": 2}
    with DiffusionGenerator.from_pretrained(tmp_path, device="cpu", backend="diffusers") as generator:
        ours = [generator.generate("a cat", seed=seed, output_type="np", **fields).images for seed in (0, 7)]
    pipe = load_reference("QwenImageEditPipeline")(tmp_path)
    place_images(pipe)
    for seed, images in zip((0, 7), ours, strict=True):
        noise = torch.Generator().manual_seed(seed)
        assert np.array_equal(images, pipe(prompt="a cat", generator=noise, output_type="np", **fields).images)


def test_expected_classes_are_networks_alone():
    assert {cls.__name__ for cls in expected_classes("StableDiffusionPipeline", "unet")} == {"UNet2DConditionModel"}
    assert expected_classes("StableDiffusionPipeline", "tokenizer") == ()
    assert expected_classes("StableDiffusionPipeline", "nothing") == ()
    assert {"vae", "unet"} <= needed_components("StableDiffusionPipeline")
    assert "image_encoder" not in needed_components("StableDiffusionPipeline")


def test_wan_runs_through_the_package(tmp_path):
    wan.build(tmp_path, "2.2")
    fields = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3}
    with DiffusionGenerator.from_pretrained(tmp_path, device="cpu", backend="diffusers") as generator:
        ours = generator.generate("a cat", seed=0, output_type="np", **fields)
    pipe: Any = diffusers.WanPipeline.from_pretrained(tmp_path)
    theirs = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="np", **fields)
    assert np.array_equal(ours.videos, theirs.frames)
