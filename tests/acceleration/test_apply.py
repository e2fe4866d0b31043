"""What a component computes by on each kind of device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.vae_decode import MODELS, latents_of, make_vae
from safelight.acceleration import apply


@pytest.mark.parametrize("name", ["AutoencoderKL", "Wan 2.1", "Qwen-Image"])
def test_convolutions_of_pictures_have_their_channels_last_on_cuda(monkeypatch, name):
    """Of videos' VAEs too, some of whose convolutions are of pictures and some of three dimensions."""
    fused = []
    monkeypatch.setattr(apply, "fuse", lambda module, device, dtype: fused.append(module))
    plain = make_vae(MODELS[name], True, torch.float32)
    vae = copy.deepcopy(plain)
    apply.accelerate(vae, "auto", torch.device("cuda"), torch.float32)
    assert fused == [vae]
    convolutions = [part for part in vae.modules() if isinstance(part, nn.Conv2d)]
    assert convolutions
    for part in convolutions:
        assert part.weight.is_contiguous(memory_format=torch.channels_last)
    latents = latents_of(plain, MODELS[name], 32, torch.float32)[:, :, :2]
    with torch.no_grad():
        made, expected = (each.decode(latents, return_dict=False)[0] for each in (vae, plain))
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_plain_leaves_everything_as_it_is(monkeypatch):
    vae = make_vae(MODELS["AutoencoderKL"], True, torch.float32)
    before = {name: tensor.stride() for name, tensor in vae.state_dict().items()}
    for device in ("cpu", "cuda"):
        apply.accelerate(vae, "plain", torch.device(device), torch.float32)
    assert {name: tensor.stride() for name, tensor in vae.state_dict().items()} == before
