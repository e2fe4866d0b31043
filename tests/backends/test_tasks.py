"""What else a model's components do: a request's pictures select it, and the bytes are those of that pipeline alone."""

from __future__ import annotations

import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageOps

from safelight import DiffusionGenerator, media
from safelight.backends.tasks import params_of, related
from safelight.core.executor import Execution
from safelight.errors import InvalidParameterError, ModelIndexError, UnknownParameterError
from safelight.loading.repository import open_repository
from safelight.testing.models import requests
from safelight.testing.recipes import shake
from tests.backends import conftest
from tests.backends.conftest import BUILDERS
from tests.loading.conftest import edit_json
from tests.recipes import flux

SEEDS = [0, pytest.param(7, marks=pytest.mark.slow)]
SIZE = (64, 32)
"""Width and height."""
PICTURE = Image.linear_gradient("L").resize(SIZE).convert("RGB")
OTHER = PICTURE.rotate(180)
CONTROL = Image.radial_gradient("L").resize(SIZE).convert("RGB")
TRANSPARENT = Image.new("RGBA", SIZE, (9, 9, 9, 255))
TRANSPARENT.paste((200, 10, 10, 0), (16, 0, 48, 32))
WHITE = Image.new("L", SIZE, 0)
WHITE.paste(255, (16, 0, 48, 32))
FIELDS: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.75}
CLASSES = {
    "StableDiffusionPipeline": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "StableDiffusionXLPipeline": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "StableDiffusion3Pipeline": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "FluxPipeline": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}
"""By the class that the index names, those that a picture and a mask select."""
SIZED = {"StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"}
"""Those that take their size from the picture alone."""


def stable_diffusion_3(folder):
    """Build one whose latents have 16 channels: its pipeline of masks asks for them."""
    torch.manual_seed(0)
    components = conftest.stable_diffusion_3(folder, channels=16)
    diffusers.StableDiffusion3Pipeline(**components).save_pretrained(folder)


OWN = {"FluxPipeline": lambda folder: flux.build(folder, "default"), "StableDiffusion3Pipeline": stable_diffusion_3}


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """Return a function that gives a folder whose index names a class, and a generator of it."""
    opened: dict[str, Any] = {}

    def of(name):
        if name not in opened:
            folder = tmp_path_factory.mktemp(name) if name in OWN else checkpoint(name)
            OWN.get(name, lambda _: None)(folder)
            opened[name] = (folder, DiffusionGenerator.from_pretrained(folder, device="cpu", backend="diffusers"))
        return opened[name]

    yield of
    for _, generator in opened.values():
        generator.close()


def theirs(cls, folder, seed, more=None, **fields):
    pipe = getattr(diffusers, cls).from_pretrained(folder, **(more or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe(**fields, generator=torch.Generator().manual_seed(seed), output_type="np")[0]


def sized(cls):
    return {} if cls in SIZED else {"height": SIZE[1], "width": SIZE[0]}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("XL" in name)) for name in CLASSES])
def test_a_picture_selects_and_a_mask_too(model, name, seed):
    folder, generator = model(name)
    from_image, from_mask = CLASSES[name]
    text = {"prompt": "a cat", "num_inference_steps": 4, "height": 32, "width": 64}
    made = generator.generate(**text, seed=seed, output_type="np")
    assert np.array_equal(made.images, theirs(name, folder, seed, **text))
    fields = {"prompt": "a cat", "image": PICTURE, **FIELDS, **sized(from_image)}
    edited = generator.generate(**fields, seed=seed, output_type="np")
    assert np.array_equal(edited.images, theirs(from_image, folder, seed, **fields))
    fields = {"prompt": "a cat", "image": PICTURE, **FIELDS, **sized(from_mask)}
    wanted = theirs(from_mask, folder, seed, **fields, mask_image=WHITE)
    painted = generator.generate(**fields, mask=TRANSPARENT, seed=seed, output_type="np")
    assert np.array_equal(painted.images, wanted)
    assert np.array_equal(generator.generate(**fields, mask_image=WHITE, seed=seed, output_type="np").images, wanted)
    assert not np.array_equal(painted.images, edited.images)


def test_unset_fields_have_the_defaults_of_what_is_selected(model):
    _, generator = model("StableDiffusionXLPipeline")
    fields = {"prompt": "a cat", "num_inference_steps": 4, "seed": 1}
    strengths = [
        generator.generate(**fields, **more).params.set_fields().get("strength")
        for more in ({"height": 32, "width": 32}, {"image": PICTURE}, {"image": PICTURE, "mask": TRANSPARENT})
    ]
    assert strengths == [None, 0.3, 0.9999]  # as the three signatures have them


def test_pictures_matter(model):
    _, generator = model("StableDiffusion3Pipeline")
    fields = {"prompt": "a cat", **FIELDS, "seed": 1, "output_type": "np", "height": 32, "width": 64}
    made = [
        generator.generate(**fields, image=image, **mask).images
        for image, mask in (
            (PICTURE, {}),
            (OTHER, {}),
            (PICTURE, {"mask_image": WHITE}),
            (PICTURE, {"mask_image": ImageOps.invert(WHITE)}),
        )
    ]
    assert all(np.abs(made[0] - each).max() > 1e-3 for each in made[1:])
    assert np.abs(made[2] - made[3]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_picture_selects_the_pipeline_of_videos(model, seed):
    folder, generator = model("LTXPipeline")
    fields = {"prompt": "a cat", "height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 3}
    made = generator.generate(**fields, image=PICTURE, seed=seed, output_type="np").videos
    assert np.array_equal(made, theirs("LTXImageToVideoPipeline", folder, seed, **fields, image=PICTURE))
    assert not np.array_equal(made, generator.generate(**fields, seed=seed, output_type="np").videos)


def test_three_tasks_of_one_model_interleave_over_the_same_weights(model):
    _, generator = model("StableDiffusionPipeline")
    pipeline = generator._engine._pipeline
    stage = pipeline.stages["pipeline"]
    first, *others = stage.pipes.values()
    assert len(others) == 2 and all(pipe.unet is first.unet and pipe.vae is first.vae for pipe in others)
    asked = [
        {"height": 32, "width": 64, "num_inference_steps": 4},
        {"image": PICTURE, **FIELDS},
        {"image": PICTURE, "mask": TRANSPARENT, **FIELDS, "height": 32, "width": 64},
    ]
    asked = [{"prompt": "a cat", "seed": 3, **fields} for fields in asked]
    alone = []
    for fields in asked:
        (req,) = requests(pipeline, fields)
        with Execution(pipeline, req) as execution:
            while execution.advance():
                pass
        alone.append(req.outputs[0])
    executions = [Execution(pipeline, requests(pipeline, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [each for each in running if each.advance()]
    for execution, wanted in zip(executions, alone, strict=True):
        assert torch.equal(execution.req.outputs[0], wanted)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a strength without a picture": ({"strength": 0.5}, "strength: got 0.5; it takes nothing for StableDiffusionPip"),
    "a mask without a picture": ({"mask": TRANSPARENT}, "image: got None; it takes an image"),
    "a mask of another size": (
        {"image": PICTURE, "mask": TRANSPARENT.resize((32, 32))},
        "mask: got '32x32'; it takes a picture of the size of image, 64x32",
    ),
    "a mask that hides nothing": ({"image": PICTURE, "mask": WHITE}, "mask: got 'a picture without transparency'"),
    "two masks": ({"image": PICTURE, "mask": TRANSPARENT, "mask_image": WHITE}, "mask: got 'a picture'; it takes noth"),
    "a size that the picture has": ({"image": PICTURE, "height": 64}, "height: got 64; it takes nothing for StableDi"),
}


@pytest.mark.parametrize(("fields", "says"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_refused_by_name(model, fields, says):
    _, generator = model("StableDiffusionPipeline")
    with pytest.raises(InvalidParameterError) as caught:
        generator.generate("a cat", num_inference_steps=2, **fields)
    assert says in str(caught.value)


def test_the_schema_says_what_selects_what(model):
    _, generator = model("StableDiffusionPipeline")
    schema = generator.schema.json_schema()
    found = {each["pipeline"]: each for each in schema["x-pipelines"]}
    assert list(found) == ["StableDiffusionPipeline", *CLASSES["StableDiffusionPipeline"]]
    assert [each["selectedBy"] for each in found.values()] == [[], ["image"], ["image", "mask_image"]]
    assert "StableDiffusionInpaintPipeline" in schema["properties"]["mask"]["description"]
    assert found["StableDiffusionImg2ImgPipeline"]["defaults"]["strength"] == 0.8
    assert schema["required"] == []  # as the call has it


def test_each_task_has_its_own_solvers(model):
    """What adds noise to a picture needs a solver that can; text alone takes more."""
    _, generator = model("StableDiffusion3Pipeline")
    found = {each["pipeline"]: each["schedulers"] for each in generator.schema.json_schema()["x-pipelines"]}
    text, edit = found["StableDiffusion3Pipeline"], found["StableDiffusion3Img2ImgPipeline"]
    assert "dpmpp_2m_sde" in text and "dpmpp_2m_sde" not in edit and "heun" in edit
    assert set(generator.schema.json_schema()["properties"]["scheduler"]["enum"]) == {*text, *edit}
    asked = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 1, "output_type": "np"}
    own = generator.generate("a cat", **asked).images[0]
    assert not np.array_equal(own, generator.generate("a cat", scheduler="dpmpp_2m_sde", **asked).images[0])
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    asked = {key: value for key, value in asked.items() if key not in ("height", "width")}
    edited = [
        generator.generate("a cat", image=picture, **more, **asked).images[0] for more in ({}, {"scheduler": "heun"})
    ]
    assert not np.array_equal(*edited)
    with pytest.raises(InvalidParameterError, match=r"^scheduler: got 'dpmpp_2m_sde'; it takes one of .*heun"):
        generator.generate("a cat", image=picture, scheduler="dpmpp_2m_sde", **asked)


def test_the_file_says_what_made_it(model, tmp_path):
    _, generator = model("StableDiffusionPipeline")
    result = generator.generate("a cat", image=PICTURE, mask=TRANSPARENT, num_inference_steps=2, seed=0)
    (path,) = result.save(tmp_path / "cat.png")
    assert media.read_metadata(path)["pipeline"] == "StableDiffusionInpaintPipeline"


def test_a_network_that_takes_more_than_latents_does_what_its_index_says_alone(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    edit_json(folder / "unet" / "config.json", in_channels=9)
    edit_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    options = open_repository(folder, weights=False).pipeline.sampling_param_cls()
    assert [task.pipeline_name for task in options.tasks] == ["StableDiffusionInpaintPipeline"]  # type: ignore[attr-defined]


def controlnet(folder, seed):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(seed)
    return shake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)), seed)


@pytest.fixture(scope="module")
def controlled(checkpoint, tmp_path_factory):
    """Return a repository whose index names the base class, and a control net's folder."""
    folder, own = checkpoint("StableDiffusionPipeline"), tmp_path_factory.mktemp("controlnet")
    controlnet(folder, 5).save_pretrained(own)
    return folder, own


@pytest.mark.parametrize("seed", SEEDS)
def test_a_component_and_a_class_add_what_the_index_lacks(controlled, seed):
    folder, own = controlled
    settings: dict[str, Any] = {"pipeline": "StableDiffusionControlNetPipeline", "component": {"controlnet": str(own)}}
    more = {"controlnet": ControlNetModel.from_pretrained(own)}
    with DiffusionGenerator.from_pretrained(folder, device="cpu", **settings) as generator:
        text = {"prompt": "a cat", "image": CONTROL, "num_inference_steps": 3}
        made = generator.generate(**text, seed=seed, output_type="np")
        expected = theirs("StableDiffusionControlNetPipeline", folder, seed, more, **text)
        assert np.array_equal(made.images, expected)
        other = generator.generate(**{**text, "image": OTHER}, seed=seed, output_type="np")
        assert not np.array_equal(other.images, expected)
        fields = {"prompt": "a cat", "image": PICTURE, "control_image": CONTROL, **FIELDS, "height": 32, "width": 64}
        edited = generator.generate(**fields, seed=seed, output_type="np")
        wanted = theirs("StableDiffusionControlNetImg2ImgPipeline", folder, seed, more, **fields)
        assert np.array_equal(edited.images, wanted)
        painted = generator.generate(**fields, mask=TRANSPARENT, seed=seed, output_type="np")
        fields["mask_image"] = WHITE
        wanted = theirs("StableDiffusionControlNetInpaintPipeline", folder, seed, more, **fields)
        assert np.array_equal(painted.images, wanted)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"pipeline": "NoPipeline"},
            "pipeline: got 'NoPipeline'; it takes a class that `safelight models --all` lists",
        ),
        (
            {"pipeline": "StableDiffusionControlNetPipeline"},
            "needs controlnet, which the model has not; component adds",
        ),
        ({"component": {"controlnet": "OWN"}}, "component: got 'controlnet'; it takes components of StableDiffusionP"),
        ({"component": {"vae": "/nowhere/at/all"}}, "component['vae']: got '/nowhere/at/all'; it takes a folder, or"),
        ({"component": {"vae": "EMPTY"}}, "it takes a folder with config.json or scheduler_config.json"),
        ({"component": {"vae": "OWN"}}, "component['vae']: got 'ControlNetModel'; it takes AutoencoderKL"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_do_not_fit_are_one_clear_error(controlled, tmp_path, settings, says):
    folder, own = controlled
    places = {"OWN": str(own), "EMPTY": str(tmp_path)}
    component = {name: places.get(where, where) for name, where in settings.get("component", {}).items()}
    with pytest.raises((InvalidParameterError, ModelIndexError)) as caught:
        DiffusionGenerator.from_pretrained(folder, device="cpu", **{**settings, "component": component})
    assert says in str(caught.value)


def test_tables_are_the_packages_own():
    assert {cls.__name__ for cls in related("FluxPipeline")} == {"FluxImg2ImgPipeline", "FluxInpaintPipeline"}
    assert not list(related("StableVideoDiffusionPipeline"))
    params = params_of("FluxPipeline", ())
    assert [task.pipeline_name for task in params.tasks] == ["FluxPipeline"], "nothing is built without components"
    with pytest.raises(UnknownParameterError):
        params.from_fields({"prompt": "a cat", "image": PICTURE})


def test_all_builders_have_their_others():
    names = {name for name in BUILDERS if list(related(name))}
    assert names >= {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "LTXPipeline"}


@pytest.mark.parametrize("backend", ["auto", "native", "diffusers"])
def test_an_index_of_an_unknown_class_is_one_clear_error(checkpoint, tmp_path, backend):
    folder = shutil.copytree(checkpoint("StableDiffusionPipeline"), tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="PipelineOfMine")
    with pytest.raises(ModelIndexError, match="'PipelineOfMine' is"):
        open_repository(folder, backend=backend)
