"""Every argument of ten pipelines with a wrong kind, a wrong length, a null: one clear line, or what was asked for."""

from __future__ import annotations

import re

import diffusers
import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.options import MEDIA_KINDS, NULL
from safelight.core.request import Req
from safelight.errors import SafelightError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.results import GenerationResult, output_from_media
from safelight.video import read_sound
from tests.backends.conftest import BUILDERS, FIELDS, OTHERS, WITHOUT_TEXT

NAMES = [*BUILDERS, *WITHOUT_TEXT, *OTHERS]
OF_KINDS = {
    "a text": "x",
    "a number": 0.5,
    "a whole number": -1,
    "true": True,
    "an object": {"a": {"b": [1, None]}},
    "nothing in a list": [],
    "a list of one": [0.5],
    "a list of many": [1, 2, 3, 4, 5, 6, 7],
    "lists of lists": [[1], [2, 3]],
    "lists of texts": ["a", "b"],
    "null in a list": [None],
    "too deep": [[[[[1]]]]],
    "not finite": float("nan"),
    "too large": 10**30,
    "null": None,
    "bytes": b"ab",
    "an object of ours": object(),
}


def test_there_are_ten_classes_of_every_mechanism():
    """UNets and transformers, several encoders, pictures, videos, sound, lists for several networks, no prompt."""
    assert len(NAMES) >= 10


def values_of(option):
    """Yield what is wrong for a field, or at its edge: by name of the case."""
    for case, value in OF_KINDS.items():
        if option.kind in MEDIA_KINDS or not isinstance(value, bytes):
            yield case, value


@pytest.mark.parametrize("name", NAMES)
def test_what_the_edge_refuses_it_refuses_by_name_in_one_line(checkpoint, loaded_pipeline, name):
    pipeline = loaded_pipeline(name)
    refused = taken = 0
    for key, option in pipeline.schema.params_cls.options().items():
        for case, value in values_of(option):
            fields = {"prompt": "a cat", "seed": 0, **FIELDS[name], key: value}
            fields = {field: each for field, each in fields.items() if field in pipeline.schema.params_cls.options()}
            try:
                params, _ = prepare(pipeline.schema, fields)
            except UsageError as error:
                refused += 1
                assert re.match(rf"{key}\b", str(error)) and "\n" not in str(error), (case, str(error))
                assert len(str(error)) < 600
            else:
                taken += 1
                assert (vars(params)[key] is NULL) is (value is None and option.nullable), (key, case)
    assert refused > 3 * taken


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_the_edge_takes_ends_in_an_output_or_one_line(checkpoint, loaded_pipeline, name):
    """Whatever the package does with it."""
    pipeline = loaded_pipeline(name)
    options = pipeline.schema.params_cls.options()
    usual = {"prompt": "a cat", "seed": 0, **FIELDS[name], "num_inference_steps": 2, "output_type": "np"}
    usual = {field: value for field, value in usual.items() if field in options}
    outcomes = {"made": 0, "refused": 0}
    for key, option in options.items():
        for case, value in values_of(option):
            if (
                key in ("n", "num_inference_steps", "height", "width", "num_frames", "video_length")
                or case == "too large"
            ):
                continue  # how much work there is, is bounded elsewhere
            try:
                params, _ = prepare(pipeline.schema, {**usual, key: value})
            except UsageError:
                continue
            try:
                with Execution(pipeline, Req("r", params.split()[0])) as execution:
                    while execution.advance():
                        pass
                assert execution.req.outputs, (key, case)
                outcomes["made"] += 1
            except SafelightError as error:
                assert error.status < 500 or error.code == "non_finite_output", (key, case, error)
                assert "\n" not in str(error) and not re.search(r"0x|\.py|Traceback", str(error)), (key, case)
                outcomes["refused"] += 1
    assert outcomes["made"] >= 2, "something of each is taken"


@pytest.fixture(scope="module")
def loaded_pipeline(checkpoint):
    cache = {}

    def of(name):
        if name not in cache:
            torch.manual_seed(0)
            cache[name] = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu"))
        return cache[name]

    return of


def test_a_sound_is_made_saved_and_is_that_of_the_package(checkpoint, loaded_pipeline, tmp_path):
    name = "LongCatAudioDiTPipeline"
    pipeline = loaded_pipeline(name)
    params, _ = prepare(pipeline.schema, {"prompt": "a cat", "seed": 3, **FIELDS[name]})
    with Execution(pipeline, Req("r", params)) as execution:
        while execution.advance():
            pass
    (made,) = execution.req.outputs
    pipe = diffusers.LongCatAudioDiTPipeline.from_pretrained(checkpoint(name))
    wanted = pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="pt", **FIELDS[name]).audios
    assert torch.equal(made.samples, wanted.reshape(made.samples.shape)) and made.sampling_rate == 24000
    result = GenerationResult([output_from_media([made], params, {}, [], False)], params, pipeline.schema)
    (path,) = result.save(tmp_path / "made.wav")
    heard = read_sound(path.read_bytes())
    assert heard is not None and heard.sampling_rate == 24000 and heard.samples.shape == made.samples.shape
    assert pipeline.schema.task == "T2A"


def test_a_scale_a_network_is_one_number_or_several(checkpoint, loaded_pipeline):
    """The package's own picture, and another scale gives another."""
    name = "StableDiffusionControlNetPipeline"
    pipeline, made = loaded_pipeline(name), []
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    for scale in (0.5, 2.0):
        fields = {**FIELDS[name], "controlnet_conditioning_scale": scale, "control_guidance_end": [0.9]}
        params, _ = prepare(pipeline.schema, {"prompt": "a cat", "seed": 3, "output_type": "np", **fields})
        with Execution(pipeline, Req("r", params)) as execution:
            while execution.advance():
                pass
        made.append(execution.req.outputs[0].numpy())
        wanted = pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="np", **fields).images[0]
        assert np.array_equal(made[-1], wanted)
    assert np.abs(made[0] - made[1]).max() > 1e-3
