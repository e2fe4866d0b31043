"""Attention backends of the package's networks, under our names: which run here, that they agree, what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from safelight import ServerArgs
from safelight.backends.attention import DISPATCHED, torchs_own_attention
from safelight.core.executor import Execution
from safelight.errors import InvalidParameterError, SafelightError
from safelight.loading.loader import load_pipeline
from safelight.testing.models import requests
from tests.backends.conftest import FIELDS

RUN_HERE = {"LTXPipeline": ("sdpa", "math"), "WanVACEPipeline": ("sdpa", "math", "flash")}
"""What the package's dispatcher can run on a CPU, of a network that is given masks, and of one that is not."""


def loaded(folder, **settings):
    return load_pipeline(ServerArgs(str(folder), device="cpu", **settings))


def made_by(pipeline, name, seed):
    (req,) = requests(pipeline, {"prompt": "a cat", **FIELDS[name], "seed": seed, "output_type": "np"})
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs[0]


def used(monkeypatch):
    """Return the names of the package's backends that are called from now on, and how often."""
    found: dict[str, int] = {}
    for name, inner in list(_AttentionBackendRegistry._backends.items()):

        def counted(*args, _name=name.value, _inner=inner, **kwargs):
            found[_name] = found.get(_name, 0) + 1
            return _inner(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)
    return found


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("name", "backend"), [(name, each) for name, kinds in RUN_HERE.items() for each in kinds])
def test_each_that_runs_here_agrees_with_torchs_own(checkpoint, name, backend, seed, monkeypatch):
    wanted, other = (made_by(loaded(checkpoint(name)), name, each) for each in (seed, seed + 1))
    pipeline = loaded(checkpoint(name), attention_backend=backend)
    calls = used(monkeypatch)
    made = made_by(pipeline, name, seed)
    assert calls.keys() == {DISPATCHED[backend]} and calls[DISPATCHED[backend]] > 4
    error = (made - wanted).abs().max()
    assert error <= (0 if backend == "sdpa" else 1e-4) and (other - wanted).abs().max() > 100 * error


def test_one_models_choice_is_no_other_models(checkpoint, monkeypatch):
    loaded(checkpoint("LTXPipeline"), attention_backend="math")
    other = loaded(checkpoint("LTXPipeline"))
    calls = used(monkeypatch)
    made_by(other, "LTXPipeline", 0)
    assert calls.keys() == {"native"}


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("LTXPipeline", {"attention_backend": "nonsense"}, "auto, chunked"),
        ("LTXPipeline", {"attention_backend": "chunked"}, "diffusers package"),
        ("LTXPipeline", {"attention_backend": "flash3"}, "cuda|kernels"),
        ("LTXPipeline", {"attention_backend": "efficient"}, "does not run on cpu"),
        ("LTXPipeline", {"attention_backend": "cudnn", "dtype": "bfloat16"}, "does not run on cpu"),
        ("LTXPipeline", {"attention_backend": "flash"}, "is given encoder_attention_mask"),
        ("StableDiffusionXLPipeline", {"attention_backend": "math"}, "does not let its backend be chosen"),
        ("DDPMPipeline", {"attention_backend": "sdpa"}, "does not let its backend be chosen"),
    ],
)
def test_what_cannot_is_refused_at_start(checkpoint, name, settings, says):
    with pytest.raises(SafelightError, match="attention_backend") as caught:
        loaded(checkpoint(name), **settings)
    assert isinstance(caught.value, InvalidParameterError) or settings["attention_backend"] == "flash3"
    assert torch.cuda.is_available() or re.search(says, str(caught.value))


def test_float32_is_computed_by_torchs_own_attention(checkpoint, monkeypatch):
    network = loaded(checkpoint("LTXPipeline"), attention_backend="math").get_module("transformer")
    calls = used(monkeypatch)
    given = {
        "hidden_states": torch.randn(1, 24, 8),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "timestep": torch.ones(1),
        "encoder_attention_mask": torch.ones(1, 7),
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }
    with torch.inference_mode():
        with torchs_own_attention(network):
            network(**given)
        assert calls.keys() == {"native"}
        network(**given)
    assert calls.keys() == {"native", "_native_math"}
