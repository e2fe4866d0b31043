"""The reference is called with what ours was given, in its own words, and watched."""

from __future__ import annotations

import pytest
import torch

from safelight import ServerArgs
from safelight.checking.reference import reference_arguments, run_reference
from safelight.errors import UsageError
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare

FIELDS = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 24, "seed": 3}


@pytest.fixture(scope="module")
def pipe(checkpoints):
    args = ServerArgs(str(checkpoints.folder()), device="cpu", backend="diffusers")
    return load_pipeline(args).get_module("pipeline")


@pytest.fixture(scope="module")
def schema(checkpoints):
    return load_pipeline(ServerArgs(str(checkpoints.folder()), device="cpu")).schema


def test_arguments_are_those_of_the_reference(pipe, schema):
    """The seed as a generator; what it does not take, or has in other words, is left out."""
    params, _ = prepare(schema, {**FIELDS, "sigmas": [1.0, 0.5], "n": 1, "output_type": "np"})
    given = reference_arguments(pipe, params)
    assert {"prompt", "height", "width", "max_sequence_length", "generator"} <= given.keys()
    assert not {"seed", "n", "output_type"} & given.keys()
    assert given["sigmas"] == [1.0, 0.5], "a list, which a tuple is here"
    assert given["generator"].initial_seed() == 3


def test_what_it_makes_is_kept_under_our_names(pipe, schema):
    params, _ = prepare(schema, {**FIELDS, "n": 1, "output_type": "np"})
    made = run_reference(pipe, params, {"text_encoder": pipe.text_encoder}, {"transformer": ["proj_out"]})
    names = [
        "text_encoder: token ids", "initial noise", "timesteps", "sigmas", "latents after step 1",
        "latents after step 2", "pixels",
    ]  # fmt: skip
    assert {*names} <= made.entries.keys()
    assert [call.step for call in made.calls] == [0, 1] and ".proj_out" in made.calls[0].entries
    assert not {"prepare_latents"} & vars(pipe).keys() and "encode" not in vars(pipe.vae)


def test_what_it_refuses_is_the_users_mistake(pipe, schema, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("`height` is wrong")

    monkeypatch.setattr(type(pipe), "check_inputs", refuse)
    params, _ = prepare(schema, {**FIELDS, "n": 1, "output_type": "np"})
    with torch.no_grad(), pytest.raises(UsageError, match="FluxPipeline: `height` is wrong"):
        run_reference(pipe, params, {}, {"transformer": []})
