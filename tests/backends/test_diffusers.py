"""Pipelines of the diffusers package, a step at a time: the same bytes, and the same control, as everywhere."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import threading
import time
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch

from safelight import DiffusionGenerator, ServerArgs
from safelight.backends.diffusers import describe as describe_pipeline
from safelight.backends.diffusers import has_pipeline, pipeline_entry
from safelight.backends.refusals import one_line, refusal
from safelight.core.executor import Execution
from safelight.core.package_params import PackageParams
from safelight.core.registry import pipelines
from safelight.errors import (
    CheckpointError,
    InvalidParameterError,
    ModelIndexError,
    PackageError,
    UnknownParameterError,
    UsageError,
)
from safelight.loading.loader import describe, load_pipeline
from safelight.loading.repository import open_repository
from safelight.preparation import prepare
from safelight.runtime.cost import request_cost
from safelight.testing.models import requests
from tests.backends import builders
from tests.backends.conftest import BUILDERS, FIELDS, VIDEO, WITHOUT_TEXT

NAMES = list(BUILDERS)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    cache = {}

    def of(name):
        if name not in cache:
            cache[name] = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu"))
        return cache[name]

    return of


def reference(checkpoint, name, **fields):
    pipe = getattr(diffusers, name).from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(fields.pop("seed", 0))
    return pipe(**{**FIELDS[name], **fields}, generator=generator)[0]


def alone(pipeline, fields):
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs


def pixels(result, name):
    return result.videos if name in VIDEO else result.images


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "safelight-step"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_bytes_are_those_of_diffusers_alone(checkpoint, name, seed):
    with DiffusionGenerator.from_pretrained(checkpoint(name), device="cpu") as generator:
        result = generator.generate("a photo of a cat", seed=seed, output_type="np", **FIELDS[name])
        pictures = generator.generate("a photo of a cat", seed=seed, output_type="pil", **FIELDS[name])
    expected = reference(checkpoint, name, prompt="a photo of a cat", seed=seed, output_type="np")
    ours = result.videos if name in VIDEO else result.images
    assert np.array_equal(ours, np.asarray(expected))
    in_pil = reference(checkpoint, name, prompt="a photo of a cat", seed=seed, output_type="pil")
    media = pictures.videos if name in VIDEO else pictures.images
    frames, wanted = (media[0], in_pil[0]) if name in VIDEO else (media, in_pil)
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in wanted]
    assert any("diffusers package" in warning for warning in result.warnings)
    assert not threads()


@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_pipelines_without_text_take_none(checkpoint, name, tmp_path):
    with DiffusionGenerator.from_pretrained(checkpoint(name), device="cpu") as generator:
        result = generator.generate(seed=3, output_type="np", **FIELDS[name])
        assert "prompt" not in generator.schema.json_schema()["properties"]
        with pytest.raises(UnknownParameterError, match="prompt"):
            generator.generate("a cat", **FIELDS[name])
        several = generator.generate(seed=3, n=2, output_type="np", **FIELDS[name])
    expected = reference(checkpoint, name, seed=3, output_type="np")
    assert np.array_equal(pixels(result, name), np.asarray(expected))
    assert np.array_equal(pixels(several, name)[:1], pixels(result, name)) and several.seeds == [3, 4]
    assert result.params.prompt is None and not threads()


def test_a_picture_that_the_safety_checker_blackens_says_so(tmp_path):
    torch.manual_seed(0)
    components = builders.stable_diffusion(tmp_path, threshold=-2.0)
    diffusers.StableDiffusionPipeline(**components).save_pretrained(tmp_path)
    with DiffusionGenerator.from_pretrained(tmp_path, device="cpu") as generator:
        result = generator.generate("a cat", seed=0, output_type="np", **FIELDS["StableDiffusionPipeline"])
    assert not result.images.any() and any("safety checker" in warning for warning in result.warnings)


@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_what_a_call_cannot_do_without_is_asked_for(checkpoint, name):
    schema = describe(open_repository(checkpoint(name)))
    assert issubclass(schema.params_cls, PackageParams)
    for field in schema.params_cls.tasks[0].needs:
        fields = {key: value for key, value in FIELDS[name].items() if key != field}
        with pytest.raises(InvalidParameterError, match=field):
            prepare(schema, fields)
    assert request_cost(prepare(schema, FIELDS[name])[0], schema) > 0
    assert ("image" in schema.json_schema()["required"]) is (name == "StableVideoDiffusionPipeline")


def test_a_form_of_result_that_a_call_does_not_know_is_refused(checkpoint):
    for name, latent in (("DDPMPipeline", False), ("StableDiffusionPipeline", True)):
        schema = describe(open_repository(checkpoint(name)))
        assert ("latent" in schema.params_cls.options()["output_type"].choices) is latent


def test_every_pipeline_of_the_package_is_described_or_refused_by_name():
    """Those that are refused need tensors, or take no generator: with a seed they would make any picture."""
    counts: Counter[str] = Counter()
    for name in filter(has_pipeline, dir(diffusers)):
        try:
            cls = pipeline_entry(name).sampling_param_cls()
        except ModelIndexError as error:
            assert name in str(error)
            counts["refused"] += 1
            continue
        assert issubclass(cls, PackageParams)
        first, *others = cls.tasks
        call = dict(inspect.signature(getattr(diffusers, name).__call__).parameters)
        assert {"generator", "output_type"} <= call.keys() and first.pipeline_name == name
        assert ("prompt" in cls.options()) is ("prompt" in call)
        for task in others:
            call |= inspect.signature(getattr(diffusers, task.pipeline_name).__call__).parameters
        passed_on = cls.options().keys() - {"seed", "n", "fps", "scheduler", "output_type", "mask"}
        assert passed_on <= call.keys(), "a field that the call does not take would be dropped"
        assert describe_pipeline("x", name, cls, ()).json_schema()["title"] == name
        counts["described"] += 1
    assert counts["described"] > 250 and counts["refused"] < 30


@pytest.mark.parametrize("name", NAMES)
def test_two_requests_of_one_model_interleave(loaded, name):
    pipeline = loaded(name)
    asked = [
        {"prompt": "a cat", "seed": 1, **FIELDS[name]},
        {"prompt": "two dogs at dawn", "seed": 2, **FIELDS[name], "num_inference_steps": 3},
        {"prompt": "a cat", "seed": 1, **FIELDS[name]},
    ]
    expected = [alone(pipeline, fields) for fields in asked]
    executions = [Execution(pipeline, requests(pipeline, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    for execution, outputs in zip(executions, expected, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(execution.req.outputs, outputs, strict=True))
        assert execution.req.step_index == execution.req.num_inference_steps
    assert not threads()


@pytest.mark.parametrize("name", NAMES)
def test_closing_stops_within_a_step(loaded, name):
    pipeline = loaded(name)
    pipe = pipeline.get_module("pipeline")
    forwards = []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda *_: forwards.append(1))
    (req,) = requests(pipeline, {"prompt": "a cat", **FIELDS[name]})
    execution = Execution(pipeline, req)
    while req.step_index < 2:
        assert execution.advance()
    calls = 4 if name == "WanVACEPipeline" else 2  # of Wan, one for each branch of guidance
    assert len(forwards) == calls
    execution.close()
    handle.remove()
    assert len(forwards) == calls and not threads() and not req.outputs


def test_the_backend_can_be_asked_for_by_name(tmp_path):
    from tests.recipes.flux import build

    build(tmp_path, "default")
    fields = {"height": 32, "width": 32, "num_inference_steps": 3, "seed": 4, "output_type": "np"}
    with DiffusionGenerator.from_pretrained(tmp_path, device="cpu") as native:
        ours = native.generate("a cat", **fields)
    with DiffusionGenerator.from_pretrained(tmp_path, device="cpu", backend="diffusers") as other:
        theirs = other.generate("a cat", **fields)
    assert np.abs(ours.images - theirs.images).max() <= 1e-4
    assert theirs.warnings == [] and ours.warnings == []
    with pytest.raises(InvalidParameterError, match="backend"):
        DiffusionGenerator.from_pretrained(tmp_path, backend="nonsense")
    assert "FluxPipeline" in pipelines()


def test_parameters_are_those_of_the_signature(loaded):
    schema = loaded("StableDiffusion3Pipeline").schema
    assert schema.defaults["guidance_scale"] == 7.0 and schema.defaults["max_sequence_length"] == 256
    options = schema.params_cls.options()
    assert {"prompt_3", "skip_guidance_layers", "clip_skip", "seed", "n"} <= set(options)
    assert not {"num_frames", "latents", "ip_adapter_image"} & set(options)
    assert not {"image", "mask_image"} & {*schema.params_cls.tasks[0].fields}  # they select other pipelines
    for name in ("latents", "prompt_embeds", "generator"):
        with pytest.raises(UnknownParameterError):
            schema.params_cls.from_fields({"prompt": "x", name: None})
    assert loaded("LTXPipeline").schema.task == "TI2V"  # a picture selects its other pipeline


def test_a_value_that_the_pipeline_refuses_is_one_clear_error(loaded):
    pipeline = loaded("StableDiffusion3Pipeline")
    (req,) = requests(pipeline, {"prompt": "a cat", "height": 33, "width": 48, "num_inference_steps": 2})
    with pytest.raises(UsageError, match="divisible by"), Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    assert not threads()


UNCHECKED = {
    "more layers than there are": ("StableDiffusion3Pipeline", {"clip_skip": 99}, "out of range"),
    "a layer that is none": ("StableDiffusionXLPipeline", {"clip_skip": 99}, "out of range"),
    "a shift that is missing": ("shifted", {}, "mu"),
    "two schedules": ("StableDiffusionXLPipeline", {"sigmas": (1.0, 0.5), "timesteps": (900, 500)}, "timesteps"),
    "a length without end": ("LTXPipeline", {"num_frames": 9, "frame_rate": 0}, "zero"),
}


@pytest.mark.parametrize(("name", "fields", "says"), UNCHECKED.values(), ids=UNCHECKED)
def test_a_value_that_breaks_the_pipeline_is_one_clear_error_too(loaded, checkpoint, tmp_path, name, fields, says):
    """Whatever the package raises, its words come back in one line, and the next request runs."""
    if name == "shifted":
        name, folder = "StableDiffusionXLPipeline", tmp_path / "shifted"
        shutil.copytree(checkpoint(name), folder)
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
        pipeline = load_pipeline(ServerArgs(str(folder), device="cpu"))
    else:
        pipeline = loaded(name)
    (req,) = requests(pipeline, {"prompt": "a cat", **FIELDS[name], **fields})
    with pytest.raises(PackageError, match=says) as caught, Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    message = str(caught.value)
    assert name in message and "\n" not in message and not re.search(r"0x|\.py|Traceback|torch\.", message)
    assert len(message) < 400 and not threads()
    if pipeline is loaded(name):  # the other one can run nothing
        assert len(alone(pipeline, {"prompt": "a cat", "seed": 0, **FIELDS[name]})) == 1


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (CheckpointError("damaged"), True),
        (OSError("disk"), True),
        (TypeError("must be real number, not NoneType"), False),
        (AttributeError("'NoneType' object has no attribute 'shape'"), False),
        (AssertionError(), False),
        (KeyError("mu"), False),
        (ZeroDivisionError("division by zero"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_of_the_values_and_what_is_not(error, kept):
    found = refusal("SomePipeline", error)
    assert found is error if kept else isinstance(found, PackageError) and found.status == 400
    assert kept or str(error).strip("'") in str(found)


def test_what_is_said_is_one_safe_line():
    said = one_line(
        "expected torch.FloatTensor\n  in /usr/lib/python3/site-packages/diffusers/models/unet.py:12, "
        "<torch.nn.Linear object at 0x7f00aa> at 0x1234 " + "x" * 999
    )
    assert said.startswith("expected FloatTensor in a file:12, ") and len(said) <= 240 and "\n" not in said
    assert not re.search(r"0x|/|torch|\.py", said)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("vae", ["os", "system"], "refused"),
        ("vae", ["my_code", "AutoencoderKL"], "refused"),
        ("../unet", ["diffusers", "UNet2DConditionModel"], "refused"),
        ("_class_name", "DiffusionPipelineOfMine", "not supported"),
        ("_class_name", "AutoencoderKL", "not supported"),
        ("_class_name", "__doc__", "not supported"),
    ],
)
def test_foreign_code_is_refused(checkpoint, tmp_path, name, entry, message):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("StableDiffusionXLPipeline"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index[name] = entry
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelIndexError, match=message):
        DiffusionGenerator.from_pretrained(folder, device="cpu")


def test_weights_go_through_the_same_gate(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("StableDiffusionXLPipeline"), folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = unet.read_bytes()
    unet.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        DiffusionGenerator.from_pretrained(folder, device="cpu")
    unet.rename(unet.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickle checkpoint is refused"):
        DiffusionGenerator.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"layers_per_block": 10**7}, "more than 20,000 tensors"),
        (
            "text_encoder/config.json",
            {"vocab_size": 16_000_000, "max_position_embeddings": 16_000_000},
            "far larger model than its weights",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps: got 1000000000"),
    ],
)
def test_a_small_file_does_not_take_all_memory(checkpoint, tmp_path, file, change, message):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("StableDiffusionXLPipeline"), folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelIndexError, match=message):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_a_tokenizer_does_not_take_all_memory(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("StableDiffusion3Pipeline"), tmp_path / "model")
    path = folder / "tokenizer_3" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_ids": 2**70}))
    with pytest.raises(ModelIndexError, match=r"tokenizer_3/tokenizer_config.json: extra_ids: got 11805"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_every_call_of_a_network_is_a_unit(loaded):
    """So a request can be cancelled between two of one step, and between encoding, denoising and decoding."""
    pipeline = loaded("StableDiffusion3Pipeline")
    (req,) = requests(pipeline, {"prompt": "a cat", "seed": 1, **FIELDS["StableDiffusion3Pipeline"]})
    units = []
    with Execution(pipeline, req) as execution:
        more = True
        while more:
            units += [(req.stage, call.component, call.method, call.key.step) for call in req.pending]
            more = execution.advance()
    steps = req.num_inference_steps
    assert req.step_index == steps == FIELDS["StableDiffusion3Pipeline"]["num_inference_steps"]
    assert {unit[1] for unit in units if unit[0] == "text_encoding"} >= {"text_encoder", "text_encoder_2"}
    loop = [unit for unit in units if unit[0] == "denoising"]
    assert loop == [("denoising", "transformer", "forward", step) for step in range(steps)]
    assert units[-1] == ("decoding", "vae", "decode", steps)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "WanVACEPipeline"])
def test_closing_at_any_unit_leaves_nothing_behind(name, loaded):
    pipeline = loaded(name)
    fields = {"prompt": "a cat", "seed": 1, **FIELDS[name]}
    wanted = [output.clone() for output in alone(pipeline, fields)]
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        num_units = 1
        while execution.advance():
            num_units += 1
    for last in range(1, num_units):
        (req,) = requests(pipeline, fields)
        with Execution(pipeline, req) as execution:
            for _ in range(last):
                execution.advance()
        assert not threads()
    assert all(map(torch.equal, alone(pipeline, fields), wanted))


@pytest.mark.parametrize(
    "word", ["<a", "<aaa at 0x", "/a", "torch.", "a.", " at 0xf", "<", "Traceback (most recent call"]
)
def test_what_a_package_says_is_cut_before_it_is_looked_at(word):
    """It may repeat a prompt of any length."""
    began = time.process_time()
    assert len(one_line(word[:2] + word * (3_000_000 // len(word)))) <= 240
    assert time.process_time() - began < 1
