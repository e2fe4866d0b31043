"""Encoding and decoding with a causal video VAE of the libraries, one latent frame a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from safelight.layers.causal_vae import CausalDecoder, patchified
from safelight.stages.vae import UNIT_COST, Decoder, Encoder, Piece, State, Unit

LATENTS, PIXELS, CACHE = "latents", "pixels", "cache"
"""Places in the state: what is decoded, or encoded; and what is remembered of the frames before, by the names of the
decoder's convolutions, or in the order of the encoder's."""


class CausalFrameDecoder(Decoder):
    """Decodes one latent frame a unit.

    Args:
        walk: over the VAE's decoder.

    """

    def __init__(self, walk: CausalDecoder) -> None:
        self.walk = walk

    def begin(self, latents: Tensor) -> State:
        """Return the state of latents [1, C, T, H, W]."""
        return {LATENTS: latents, CACHE: {}}

    def units(self, latent_shape: Sequence[int]) -> Iterator[Unit]:
        """Yield a unit for each latent frame, each as large as a model call may be."""
        for index in range(latent_shape[2]):
            yield Unit(UNIT_COST, partial(self._decode, index))

    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return [C, T, H, W], for latents [1, C, T, H, W]."""
        return self.walk.output_shape(latent_shape)

    def _decode(self, index: int, state: State) -> Sequence[Piece]:
        """Return the frames of a latent frame."""
        frames = self.walk.decode(state[LATENTS][:, :, index : index + 1], state[CACHE])
        before = self.walk.first_frame(index)
        return [Piece(before + number, 0, frame[0][:, None]) for number, frame in enumerate(frames)]


class CausalFrameEncoder(Encoder):
    """Encodes the frames of one latent frame a unit.

    Args:
        vae: the library's module.

    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.num_convolutions = sum(isinstance(module, nn.Conv3d) for module in vae.encoder.modules())
        self.frames_per_latent: int = 2 ** sum(map(bool, vae.config["temperal_downsample"]))

    def begin(self, pixels: Tensor) -> State:
        """Return the state of a clip [1, C, T, H, W]."""
        return {
            PIXELS: patchified(pixels, self.vae.config.get("patch_size") or 1),
            CACHE: [None] * self.num_convolutions,
        }

    def num_units(self, pixel_shape: Sequence[int]) -> int:
        """Return the number of latent frames of a clip [1, C, T, H, W]."""
        return -(-(pixel_shape[2] - 1) // self.frames_per_latent) + 1

    def encode(self, state: State, index: int) -> Tensor:
        """Return the mode of the posterior, [1, C, 1, H, W], of one latent frame."""
        stop = 1 + index * self.frames_per_latent
        frames = state[PIXELS][:, :, max(0, stop - self.frames_per_latent) : stop]
        encoded = self.vae.encoder(frames, feat_cache=state[CACHE], feat_idx=[0])
        mode: Tensor = self.vae.quant_conv(encoded).chunk(2, dim=1)[0]
        return mode
