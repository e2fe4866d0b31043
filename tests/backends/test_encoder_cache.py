"""What a package's encoders made is kept by everything that it was made of, and every request has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from safelight import ServerArgs
from safelight.backends.encoder_cache import EncoderCache, digest_of, packed, rebuilt
from safelight.core.calls import CallKey, ModelCall
from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.executor import Execution
from safelight.core.model_runner import Forward
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.testing.models import requests
from tests.backends.conftest import FIELDS


def driven(pipeline, runner, fields):
    """Return the outputs of a request, and the components whose calls were made of networks."""
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req, runner) as execution:
        while execution.advance():
            pass
    return req.outputs


def watched(pipeline):
    made, inner = [], pipeline.forward

    def forward(call):
        made.append(call.component)
        return inner(call)

    pipeline.forward = forward
    return made


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableVideoDiffusionPipeline", "LTXPipeline"])
def test_bytes_are_equal_with_and_without(checkpoint, name):
    prompts = [{"prompt": text} for text in ("a cat", "a cat", "two dogs")]
    if name == "StableVideoDiffusionPipeline":
        prompts = [{}, {}, {"image": FIELDS[name]["image"].rotate(90).resize((96, 64))}]
    asked = [{**FIELDS[name], "seed": number, **own} for number, own in enumerate(prompts)]
    found: dict[str, list[list[torch.Tensor]]] = {}
    for size in ("256MiB", "0"):
        pipeline = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu", conditioning_cache=size))
        made = watched(pipeline)
        runner, counts = PipelineRunner(pipeline), []
        for fields in asked:
            found.setdefault(size, []).append(driven(pipeline, runner, fields))
            counts.append(sum("encoder" in component for component in made))
            made.clear()
        cache = pipeline.conditioning_cache
        if size == "0":
            assert len(set(counts)) == 1 and not cache.num_bytes
        else:
            assert counts[0] >= counts[2] > counts[1] == 0
            assert cache.num_bytes > 0 and len(cache.weights) >= 2
    for with_cache, without in zip(*found.values(), strict=True):
        assert all(map(torch.equal, with_cache, without))
    assert not torch.equal(found["0"][1][0], found["0"][2][0]), "the texts matter"


class Encoder(nn.Module):
    """An encoder of an output class, whose results may share their memory, and that may do what is not to be kept."""

    def __init__(self, does=""):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.does = nn.Linear(4, 4), does

    def forward(self, hidden, generator=None, mode="plain", other=None):
        if self.does == "draws":
            hidden = hidden + torch.rand(1)
        if self.does == "draws from its generator":
            hidden = hidden + torch.rand(1, generator=generator)
        if self.does == "changes its argument":
            hidden += 1
        made = self.inner(hidden)
        if self.does == "returns its argument":
            made = hidden.T
        return BaseModelOutput(last_hidden_state=made, hidden_states=(made[1:], made.T, hidden.clone()))


def called(encoder, cache, hidden, training=(), method="forward", **arguments):
    """Make a call through the wrapper; return its result, and whether it was made."""
    made = []

    def make(forwards):
        made.extend(forwards)
        return [encoder(**each.call.kwargs) for each in forwards]

    kwargs = {"hidden": hidden, **arguments}
    call = ModelCall("encoder", kwargs, {}, None, CallKey("r/0", "0", 0), {"own": None}, method)
    with torch.inference_mode():
        (result,) = EncoderCache(cache, lambda _: True, training)([Forward(call, ())], make)
    return result, bool(made)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_request_cannot_change_what_others_get(seed):
    cache, encoder, hidden = ConditioningCache(2**20), Encoder(), torch.randn(3, 4)
    first, was_made = called(encoder, cache, hidden)
    wanted = [each.clone() for each in (first.last_hidden_state, *first.hidden_states)]
    assert was_made
    with torch.inference_mode():
        first.last_hidden_state.zero_()
    for _ in range(2):
        found, was_made = called(encoder, cache, hidden)
        assert not was_made and type(found) is BaseModelOutput and found.keys() == first.keys()
        tensors = [found.last_hidden_state, *found.hidden_states]
        assert all(map(torch.equal, tensors, wanted))
        assert [each.stride() for each in tensors] == [each.stride() for each in wanted[:1]] + [(4, 1), (1, 4), (4, 1)]
        with torch.inference_mode():
            for each in tensors:
                each.fill_(7.0)


@pytest.mark.parametrize(
    "does", ["draws", "draws from its generator", "changes its argument", "returns its argument", "trains"]
)
def test_what_draws_or_reaches_further_is_made_every_time(does):
    cache, encoder = ConditioningCache(2**20), Encoder(does)
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        _, was_made = called(
            encoder, cache, torch.ones(3, 4), ("encoder",) if does == "trains" else (), generator=generator
        )
        assert was_made and not cache.num_bytes
    if does == "draws from its generator":
        assert called(Encoder(), cache, torch.ones(3, 4), generator=generator)[1]
        assert not called(Encoder(), cache, torch.ones(3, 4), generator=generator)[1], "one that draws nothing is kept"


def test_every_argument_and_the_weights_are_part_of_what_it_is_known_by():
    cache, encoder, hidden = ConditioningCache(2**20), Encoder(), torch.randn(4, 4)
    called(encoder, cache, hidden)
    others: list[dict[str, Any]] = [
        {"hidden": hidden + 1},
        {"hidden": hidden.double().float().reshape(4, 4).T.contiguous().T},
        {"hidden": hidden, "mode": "plain"},
        {"hidden": hidden, "other": 1},
        {"hidden": hidden, "other": 1.0},
        {"hidden": hidden, "other": True},
        {"hidden": hidden, "other": [1]},
        {"hidden": hidden, "other": (1,)},
        {"hidden": hidden, "other": {"a": torch.ones(1)}},
        {"hidden": hidden, "other": {"b": torch.ones(1)}},
        {"hidden": hidden, "method": "encode"},
    ]
    for arguments in others:
        assert called(encoder, cache, **arguments)[1], arguments
        assert not called(encoder, cache, **arguments)[1], arguments
    assert not called(encoder, cache, hidden)[1]
    cache.weights = {"encoder": "others"}
    assert called(encoder, cache, hidden)[1]
    assert called(encoder, cache, hidden, other=object())[1]
    assert digest_of({"other": object()}) is None


def test_outputs_of_the_library_that_are_no_trees_are_copied_too():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pixels = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        encoded = vae.encode(pixels)
        kept = packed(encoded, [pixels])
        assert kept is not None
        memory, shell = kept
        wanted = encoded.latent_dist.sample(torch.Generator().manual_seed(1))
        encoded.latent_dist.mean.zero_()
        again = rebuilt(memory, shell)
        assert torch.equal(again.latent_dist.sample(torch.Generator().manual_seed(1)), wanted)
        assert not torch.equal(again.latent_dist.mode(), encoded.latent_dist.mode())
        again.latent_dist.mean.zero_()
        assert torch.equal(rebuilt(memory, shell).latent_dist.mode(), vae.encode(pixels).latent_dist.mode())
        assert packed(BaseModelOutput(last_hidden_state=vae), []) is None, "a network is not copied"
