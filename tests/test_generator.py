"""The Python API: what may be asked, what comes back, and how it is stopped."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from safelight import DiffusionGenerator, GenerationResult, SamplingParams
from safelight.errors import (
    InvalidParameterError,
    ModelNotFoundError,
    NonFiniteOutputError,
    OutputError,
    UnknownParameterError,
    UsageError,
)
from safelight.families.flux.params import FluxSamplingParams
from tests.loading.conftest import Checkpoints

SMALL: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 2, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def dev(folders):
    with DiffusionGenerator.from_pretrained(folders.folder("dev")) as generator:
        yield generator


@pytest.fixture(scope="module")
def schnell(folders):
    with DiffusionGenerator.from_pretrained(folders.folder("schnell")) as generator:
        yield generator


@pytest.fixture(scope="module")
def kontext(folders):
    with DiffusionGenerator.from_pretrained(folders.folder("kontext")) as generator:
        yield generator


def module_of(generator, name):
    return generator._engine._pipeline.get_module(name)


def arrays(result):
    return [np.asarray(image) for image in result.images]


def equal(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# Loading


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("torch_dtype", "did you mean 'dtype'"),
        ("attention_backends", "did you mean 'attention_backend'"),
        ("component_dtype", "did you mean 'component_dtypes'"),
        ("safety_checker", "known are attention_backend, "),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(given, words):
    with pytest.raises(UnknownParameterError, match=f"unknown parameter '{given}': .*{words}") as caught:
        settings: dict[str, Any] = {given: None}
        DiffusionGenerator.from_pretrained("anywhere", **settings)
    assert caught.value.param == given


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_as_text_or_as_torch_has_it(folders, dtype):
    with DiffusionGenerator.from_pretrained(folders.folder(), dtype=dtype, device=torch.device("cpu")) as generator:
        assert next(module_of(generator, "transformer").parameters()).dtype == torch.bfloat16
        assert generator.generate("x", **SMALL).images[0].size == (24, 16)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"dtype": "int7"}, "dtype"),
        ({"dtype": torch.int8}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"component_dtypes": {"vae": "half"}}, "component_dtypes"),
        ({"component_dtypes": {"unet": "float32"}}, "component_dtypes"),
        ({"attention_backend": "magic"}, "attention_backend"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_settings_that_do_not_fit_are_named(folders, settings, field):
    with pytest.raises(InvalidParameterError, match=f"^{field}"):
        DiffusionGenerator.from_pretrained(folders.folder(), **settings)


def test_no_such_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        DiffusionGenerator.from_pretrained(tmp_path / "nothing")


# Asking


def test_ways_to_ask_for_the_same(dev):
    alone = arrays(dev.generate("a cat", seed=1, **SMALL))
    params = FluxSamplingParams(prompt="a cat", seed=1, **SMALL)
    assert equal(arrays(dev.generate(prompt="a cat", seed=1, **SMALL)), alone)
    assert equal(arrays(dev.generate(params)), alone)
    assert equal(arrays(dev.generate(SamplingParams(prompt="a dog", seed=2), prompt="a cat", seed=1, **SMALL)), alone)
    assert equal(arrays(dev.generate(dataclasses.replace(params, seed=2), seed=1)), alone)
    assert not equal(arrays(dev.generate("a dog", seed=1, **SMALL)), alone)
    assert not equal(arrays(dev.generate("a cat", seed=2, **SMALL)), alone)


def test_prompts_and_outputs_can_each_be_had_alone(dev):
    result = dev.generate(["a cat", "a dog"], n=2, seed=5, negative_prompt=["blurry", ""], true_cfg_scale=2.0, **SMALL)
    assert result.seeds == [5, 6, 5, 6]
    assert [output.params.prompt for output in result.outputs] == ["a cat", "a cat", "a dog", "a dog"]
    for output, expected in zip(result.outputs, arrays(result), strict=True):
        assert equal(arrays(dev.generate(output.params)), [expected])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_inference_step": 2}, "did you mean 'num_inference_steps'"),
        ({"guidance": 2}, "did you mean 'guidance_scale'"),
        ({"generator": torch.Generator()}, "use seed"),
        ({"return_dict": False}, "the result is always an object"),
        ({"callback_on_step_end": print}, "stream()"),
        ({"latents": torch.zeros(1)}, "use seed"),
        ({"prompt_embeds": torch.zeros(1)}, "use prompt"),
        ({"ip_adapter_image": "x.png"}, "not supported"),
        ({"image": "x.png"}, "known are"),
        ({"num_frames": 3}, "known are"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_unknown_fields_are_refused_with_the_name_of_our_way(dev, fields, words):
    with pytest.raises(UnknownParameterError) as caught:
        dev.generate("x", **SMALL, **fields)
    assert words in str(caught.value) and caught.value.param in fields


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", None]}, "prompt"),
        ({"prompt": b"x"}, "prompt"),
        ({"height": 18}, "height"),
        ({"height": "16"}, "height"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1, "num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"sigmas": []}, "sigmas"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
    ],
)
def test_bad_values_name_the_field(dev, fields, field):
    with pytest.raises(InvalidParameterError) as caught:
        dev.generate(**{"prompt": "x", **SMALL, **fields})
    assert caught.value.param == field and str(caught.value).startswith(f"{field}: got")


def test_a_prompt_given_twice(dev):
    with pytest.raises(InvalidParameterError, match="first argument"):
        dev.generate("a cat", prompt="a dog")


def test_numbers_of_numpy_are_numbers(dev):
    result = dev.generate(
        "x", **{**SMALL, "height": np.int64(16), "guidance_scale": np.float32(2), "seed": np.uint64(3)}
    )
    assert (result.seeds, result.params.guidance_scale) == ([3], 2.0)


def test_num_images_per_prompt_is_n(dev):
    assert dev.generate("x", num_images_per_prompt=2, seed=1, **SMALL).seeds == [1, 2]


# Results


def test_output_types(dev):
    asked = {"prompt": "a cat", "n": 2, "seed": 1, **SMALL}
    results = {kind: dev.generate(output_type=kind, **asked) for kind in ("pil", "np", "pt", "latent")}
    pil, array, tensor, latent = (result.images for result in results.values())
    assert [(image.size, image.mode) for image in pil] == [((24, 16), "RGB")] * 2
    assert (array.shape, array.dtype) == ((2, 16, 24, 3), np.float32)
    assert 0 <= array.min() < array.max() <= 1
    assert (tensor.shape, tensor.dtype) == ((2, 3, 16, 24), torch.float32)
    assert np.array_equal(tensor.numpy().transpose(0, 2, 3, 1), array)
    assert all(np.array_equal(np.asarray(image), np.rint(row * 255)) for image, row in zip(pil, array, strict=True))
    assert (latent.shape, latent.dtype, latent.device.type) == ((2, 4 * 6, 16), torch.float32, "cpu")
    with pytest.raises(OutputError, match="only pil"):
        results["np"].save("x.png")


def test_a_result_says_how_it_was_made(dev, tmp_path):
    result = dev.generate(["a cat", "a dog"], seed=3, **SMALL)
    assert isinstance(result, GenerationResult)
    assert (result.seeds, result.warnings, result.videos) == ([3, 3], [], [])
    assert (result.params.guidance_scale, result.params.n, result.params.output_type) == (3.5, 1, "pil")
    assert [output.params.prompt for output in result.outputs] == ["a cat", "a dog"]
    assert all(len(output.images) == 1 for output in result.outputs)
    stages = {"text_encoding", "timestep_preparation", "latent_preparation", "conditioning", "denoising", "decoding"}
    assert stages <= result.timings.keys() and all(seconds >= 0 for seconds in result.timings.values())
    assert result.timings["denoising"] == pytest.approx(sum(output.timings["denoising"] for output in result.outputs))
    paths = result.save(tmp_path / "x.png")
    assert [path.name for path in paths] == ["x-1.png", "x-2.png"]
    with pytest.raises(OutputError, match="overwrite=True"):
        result.save(tmp_path / "x.png")
    assert result.save(str(tmp_path / "x.png"), overwrite=True) == paths


def test_an_unset_seed_is_drawn_returned_and_reproduces(dev):
    results = [dev.generate("x", **SMALL) for _ in range(3)]
    seeds = [result.seeds[0] for result in results]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**53 for seed in seeds)
    assert [result.params.seed for result in results] == seeds
    assert equal(arrays(dev.generate("x", seed=seeds[0], **SMALL)), arrays(results[0]))


def test_drawn_seeds_are_those_of_a_browser(dev, monkeypatch):
    """The largest seed that can be drawn, counted up by n, still fits."""
    monkeypatch.setattr("safelight.preparation.secrets.randbelow", lambda bound: bound - 1)
    assert dev.generate("x", n=3, **SMALL).seeds[-1] < 2**53


# Streaming


@pytest.fixture
def forwards(dev):
    """Count the transformer's forwards."""
    calls = []
    handle = module_of(dev, "transformer").register_forward_hook(lambda *args: calls.append(1))
    yield calls
    handle.remove()


def test_events_tell_how_far_it_is(dev, forwards):
    events = list(dev.stream(["a", "b"], seed=1, **{**SMALL, "num_inference_steps": 3}))
    assert [event.result is None for event in events] == [True] * (len(events) - 1) + [False]
    assert all(event != following for event, following in pairwise(events)), "an event says something new"
    progress = [(event.output_index, event.step) for event in events]
    assert progress == sorted(progress)
    assert {event.step for event in events if event.stage == "denoising"} == {0, 1, 2}
    assert {event.step for event in events if event.stage == "decoding"} == {3}
    assert {event.num_inference_steps for event in events if event.stage == "denoising"} == {3}
    assert {event.num_outputs for event in events} == {2} and {event.output_index for event in events} == {0, 1}
    stages = [event.stage for event in events if event.output_index == 0]
    assert [stage for index, stage in enumerate(stages) if stage not in stages[:index]] == [
        "input_validation",
        "text_encoding",
        "timestep_preparation",
        "latent_preparation",
        "conditioning",
        "denoising",
        "decoding",
    ]
    assert len(forwards) == 6
    assert equal(
        arrays(events[-1].result), arrays(dev.generate(["a", "b"], seed=1, **{**SMALL, "num_inference_steps": 3}))
    )


def test_leaving_the_stream_stops_the_work(dev, forwards):
    for event in dev.stream("x", **{**SMALL, "num_inference_steps": 50}):
        if event.step == 3:
            break
    assert len(forwards) == 3
    assert not torch.is_inference_mode_enabled()
    assert dev.generate("x", **SMALL).images, "the generator goes on"


def test_two_streams_do_not_disturb_each_other(dev):
    asked = [{"prompt": name, "seed": seed, **SMALL} for name, seed in (("a cat", 1), ("a dog", 2))]
    alone = [arrays(dev.generate(**fields)) for fields in asked]
    streams, results = [dev.stream(**fields) for fields in asked], []
    for events in zip(*streams, strict=True):
        results = [event.result for event in events]
    assert all(equal(arrays(result), expected) for result, expected in zip(results, alone, strict=True))


def test_bad_parameters_are_refused_before_the_stream_is_read(dev):
    with pytest.raises(InvalidParameterError):
        dev.stream("x", height=17)


def test_a_closed_generator_refuses(folders):
    with DiffusionGenerator.from_pretrained(folders.folder()) as generator:
        under_way = generator.stream("x", seed=1, **SMALL)
        next(under_way)
    with pytest.raises(UsageError, match="closed"):
        generator.generate("x", **SMALL)
    generator.close()
    assert [event.result for event in under_way][-1] is not None, "what was under way may end"


# Warnings


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("schnell", {"guidance_scale": 2.0}, "guidance_scale has no effect"),
        ("dev", {"negative_prompt": "blurry"}, "negative_prompt has no effect unless true_cfg_scale"),
        ("dev", {"true_cfg_scale": 2.0}, "true_cfg_scale has no effect without negative_prompt"),
        ("dev", {"prompt": "a cat " * 9}, "38 tokens were cut to the 16 that a text encoder takes"),
        ("kontext", {"height": 300, "width": 500, "max_area": 400}, "size: 24x12 is made, 500x300's aspect"),
    ],
)
def test_warnings(request, name, fields, words):
    result = request.getfixturevalue(name).generate(**{"prompt": "x", **SMALL, **fields})
    assert len([warning for warning in result.warnings if words in warning]) == 1, result.warnings
    assert len(set(result.warnings)) == len(result.warnings)


def test_no_warnings_without_reason(dev, schnell, kontext):
    assert dev.generate("x", negative_prompt="y", true_cfg_scale=2.0, guidance_scale=2.0, **SMALL).warnings == []
    assert schnell.generate("x", **SMALL).warnings == []
    assert kontext.generate("x", **{**SMALL, "width": 16, "max_area": 256}).warnings == []


# Images


KONTEXT = {**SMALL, "max_area": 256, "width": 16, "auto_resize": False, "seed": 1}


def photo():
    """Return a picture that is another one when it is turned."""
    return Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3))


def with_alpha(image, mode):
    if mode == "P":
        image = image.convert("P")
        image.info["transparency"] = 0
        return image
    image = image.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("from_file", [False, True])
def test_alpha_is_dropped_and_said(kontext, tmp_path, mode, from_file):
    image = with_alpha(photo(), mode)
    image.save(tmp_path / "x.png")
    source = tmp_path / "x.png" if from_file else image
    result = kontext.generate("x", image=source, **KONTEXT)
    assert result.warnings == ["image: its alpha channel is not used"]
    assert equal(arrays(result), arrays(kontext.generate("x", image=image.convert("RGB"), **KONTEXT)))


def test_an_image_is_turned_as_its_exif_says(kontext, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by a quarter
    photo().save(tmp_path / "x.png", exif=exif)
    result = kontext.generate("x", image=str(tmp_path / "x.png"), **KONTEXT)
    turned = photo().transpose(Image.Transpose.ROTATE_270)
    assert equal(arrays(result), arrays(kontext.generate("x", image=[turned], **KONTEXT)))
    assert not equal(arrays(result), arrays(kontext.generate("x", image=photo(), **KONTEXT)))
    assert result.params.image[0].size == (16, 24)


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), np.zeros((8, 8, 3)), 7, b"x", [None], [[photo()]]])
def test_what_is_no_image(kontext, image):
    with pytest.raises(InvalidParameterError, match=r"^image: got"):
        kontext.generate("x", image=image, **KONTEXT)


@pytest.mark.parametrize("image", [None, [], ()])
def test_no_image_is_no_image(kontext, image):
    assert equal(arrays(kontext.generate("x", image=image, **KONTEXT)), arrays(kontext.generate("x", **KONTEXT)))


# Failure


@pytest.mark.parametrize(
    ("component", "key", "words"),
    [("transformer", "proj_out.weight", "latents"), ("vae", "decoder.conv_out.bias", "pixels")],
)
def test_a_picture_of_nan_is_an_error(folders, dev, tmp_path, component, key, words):
    expected = arrays(dev.generate("x", seed=1, **SMALL))
    folder = folders.copy(tmp_path / "model")
    path = folder / component / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), key: load_file(path)[key] * float("nan")}, path)
    with DiffusionGenerator.from_pretrained(folder) as broken, pytest.raises(NonFiniteOutputError, match=words):
        broken.generate("x", **SMALL)
    assert equal(arrays(dev.generate("x", seed=1, **SMALL)), expected)


def test_a_failure_in_the_middle_holds_nothing(dev):
    """An error in one step ends that request alone."""
    expected = arrays(dev.generate("x", seed=1, **SMALL))
    handle = module_of(dev, "transformer").register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dev.generate("x", seed=1, **SMALL)
    handle.remove()
    assert not torch.is_inference_mode_enabled()
    assert equal(arrays(dev.generate("x", seed=1, **SMALL)), expected)
