"""Conventions of models that make pictures of tokens of 2x2 latent pixels, by flow matching: a piece for families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.core.config import (
    ComponentConfigs,
    PipelineConfig,
    check_field,
    check_rotary,
    latent_statistics,
    params_of,
)
from safelight.core.request import Latents, Req
from safelight.core.shared_params import OWN_SIGMAS, TERMINAL_SHIFT, SigmasParams
from safelight.layers.packing import PATCH_SIZE, pack_latents, unpack_latents
from safelight.stages.schedule import check_takes_sigmas, linear_mu, linear_sigmas

DEFAULT_SAMPLE_SIZE = 128
"""Latent pixels along one side of a picture, unless asked otherwise."""


@dataclass(frozen=True, kw_only=True)
class PackedLatentsConfig(PipelineConfig):
    """Latents as tokens of 2x2 latent pixels, evenly spaced noise levels, and a shift that depends on the tokens.

    Input images' tokens are made in the same way. The parameters are `SigmasParams`.

    Attributes:
        axes_dims_rope: channels of a head that turn with image number, row and column.
        own_sigmas: whether the solver spaces its noise levels itself.
        shift_terminal: noise level that the solver stretches its schedule to end at; None where it does not.

    """

    axes_dims_rope: tuple[int, ...]
    own_sigmas: bool
    shift_terminal: float | None

    @classmethod
    def fields_of(cls, configs: ComponentConfigs) -> dict[str, Any]:
        """Return the fields' values; a family adds its own, `vae_scale_factor` among them."""
        transformer, scheduler = configs["transformer"], configs["scheduler"]
        return {
            **latent_statistics(configs["vae"]),
            "latent_channels": transformer["in_channels"] // PATCH_SIZE**2,
            "axes_dims_rope": tuple(transformer["axes_dims_rope"]),
            "own_sigmas": cls.leaves_flow_sigmas and bool(scheduler.get("use_flow_sigmas")),
            "shift_terminal": scheduler.get("shift_terminal"),
        }

    @classmethod
    def check_components(cls, configs: ComponentConfigs) -> None:
        """Refuse components that do not fit each other: a request would end where they meet."""
        check_takes_sigmas(configs)
        transformer, vae = configs["transformer"], configs["vae"]
        vae_channels = vae.get("z_dim", 16) if vae.get("latents_std") else vae.get("latent_channels", 4)
        channels = transformer["in_channels"]
        check_field("transformer", "in_channels", channels, (vae_channels * PATCH_SIZE**2,))
        made = (transformer["out_channels"] or channels) * transformer["patch_size"] ** 2
        check_field("transformer", "out_channels, times patch_size squared", made, (channels,))
        check_rotary("transformer", transformer["axes_dims_rope"], 3, transformer["attention_head_dim"])

    def own_defaults(self) -> dict[str, Any]:
        """Return a square's height and width."""
        side = DEFAULT_SAMPLE_SIZE * self.vae_scale_factor
        return {"height": side, "width": side}

    @property
    def size_multiple(self) -> int:
        """Pixels along one side of a token."""
        return self.vae_scale_factor * PATCH_SIZE

    def capabilities(self) -> frozenset[str]:
        """Return what the solver does, in the words of the parameters."""
        held = ((OWN_SIGMAS, self.own_sigmas), (TERMINAL_SHIFT, bool(self.shift_terminal)))
        return frozenset(name for name, holds in held if holds)

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Return [1, C, H, W] in latent pixels."""
        return (1, self.latent_channels, *self.latent_size(batch))

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Latents:
        """Return [1, S, 4C]."""
        return pack_latents(latents)

    def post_denoising_loop(self, latents: Latents, batch: Req) -> Tensor:
        """Return [1, C, H, W] of packed latents."""
        assert isinstance(latents, Tensor)
        return unpack_latents(latents, *batch.raw_latent_shape[-2:])

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Return the noise levels asked for, or evenly spaced ones; None where the solver has its own."""
        params = params_of(batch, SigmasParams)
        if self.leaves_flow_sigmas and batch.scheduler.config.get("use_flow_sigmas"):
            return None
        if params.sigmas is not None:
            return list(params.sigmas)
        assert params.num_inference_steps is not None
        return self.spaced_sigmas(params.num_inference_steps)

    def spaced_sigmas(self, num_steps: int) -> list[float]:
        """Return evenly spaced noise levels, from 1 to 1/steps."""
        return linear_sigmas(num_steps)

    def prepare_mu(self, batch: Req, scheduler_config: Mapping[str, Any]) -> float | None:
        """Return the shift for this many tokens of the picture, on the line through the scheduler's two points."""
        height, width = self.latent_size(batch)
        return linear_mu(height // PATCH_SIZE * (width // PATCH_SIZE), scheduler_config)

    def picture_shapes(self, batch: Req) -> list[tuple[int, ...]]:
        """Return the shape [..., H, W] in latent pixels of each picture that is made."""
        return [batch.raw_latent_shape]

    def token_grids(self, batch: Req) -> list[tuple[int, int]]:
        """Return the rows and columns of tokens of each picture, and then of each input image."""
        shapes = [*self.picture_shapes(batch), *(latents.shape for latents in batch.image_latents)]
        return [(shape[-2] // PATCH_SIZE, shape[-1] // PATCH_SIZE) for shape in shapes]

    def image_tokens(self, batch: Req, dtype: torch.dtype) -> Tensor | None:
        """Return the input images' packed latents, [1, S, 4C]; None without."""
        tokens = [pack_latents(latents.to(dtype)) for latents in batch.image_latents]
        return torch.cat(tokens, dim=1) if tokens else None


def unit_timestep(t: Tensor, latents: Tensor) -> Tensor:
    """Return [B], t from 1000 to 0 as a noise level from 1 to 0.

    It is rounded to the latents' dtype before the division, as the references do.
    """
    return t.expand(latents.shape[0]).to(latents.dtype) / 1000
