"""A seed is its noise: as Diffusers draws it, on the CPU, in the embeddings' dtype."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from safelight.stages.latent_preparation import LatentPreparationStage
from tests.stages.stubs import StubConfig, drive, request


class InFloat32(StubConfig):
    """Latents keep a dtype of their own."""

    latent_dtype = torch.float32


class Packed(StubConfig):
    """The transformer takes latents in a row."""

    def maybe_pack_latents(self, latents, batch):
        return latents.flatten(1)


@pytest.mark.parametrize("config", [StubConfig(), InFloat32()], ids=["embeddings' dtype", "own dtype"])
def test_noise_is_the_references(config):
    batch = request(seed=2**63)
    batch.prompt_embeds = [torch.ones(1, 3, 5, dtype=torch.bfloat16)]
    drive(LatentPreparationStage(config), batch)
    dtype = config.latent_dtype or torch.bfloat16
    expected = randn_tensor((1, 2, 4, 2), generator=torch.Generator().manual_seed(2**63), dtype=dtype)
    assert batch.raw_latent_shape == (1, 2, 4, 2)
    assert isinstance(batch.latents, torch.Tensor) and batch.latents.dtype == dtype
    assert torch.equal(batch.latents, expected)


def test_the_generator_goes_on_where_the_noise_ended():
    batch = request()
    drive(LatentPreparationStage(Packed()), batch)
    source = torch.Generator().manual_seed(3)
    assert isinstance(batch.latents, torch.Tensor)
    assert torch.equal(batch.latents, torch.randn(1, 2, 4, 2, generator=source).flatten(1))
    assert torch.equal(torch.randn(5, generator=batch.generator), torch.randn(5, generator=source))
