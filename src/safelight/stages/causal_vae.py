"""Encoding and decoding with a causal video VAE, some frames at a time; what it remembers lies in the request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import Steps
from safelight.layers.causal_vae import CausalDecoder, patchified
from safelight.stages.decoding import DecodingStage, check_finite, to_media
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage

PIXELS, ENCODER = "pixels", "encoder"
"""Places in the request's feature cache: the clip that is encoded, and what the library's encoder remembers of it."""


class CausalVAEEncodingStage(ImageVAEEncodingStage):
    """Encodes the frames of one latent frame at a time, with a boundary between two."""

    def __init__(self, vae: Any, config: PipelineConfig) -> None:
        super().__init__(vae, config)
        self.num_convolutions = sum(isinstance(module, torch.nn.Conv3d) for module in vae.encoder.modules())
        self.frames_per_latent = 2 ** sum(map(bool, vae.config["temperal_downsample"]))

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `image_latents`, one entry an encoding."""
        for index in range(self.config.num_vae_inputs(batch)):
            if index:
                yield []
            if self.take_cached(batch, index):
                continue
            num_frames = self._begin(batch, index)
            for start in range(1 - self.frames_per_latent, num_frames, self.frames_per_latent):
                if start > 0:
                    yield []
                self._encode_frames(batch, max(start, 0), start + self.frames_per_latent)
            batch.image_latents[index:] = [torch.cat(batch.image_latents[index:], dim=2)]
            self.keep(batch, index)
            batch.feature_cache = {}

    def _begin(self, batch: Req, index: int) -> int:
        """Lay what is encoded into the feature cache; return how many frames it has."""
        pixels = self.config.prepare_vae_input(batch, index).to(self.vae.device, self.vae.dtype)
        pixels = patchified(pixels, self.vae.config.get("patch_size") or 1)
        batch.feature_cache = {PIXELS: [pixels], ENCODER: [None] * self.num_convolutions}
        return pixels.shape[2]

    def _encode_frames(self, batch: Req, start: int, stop: int) -> None:
        """Append the mode of the posterior, [1, C, 1, H, W], scaled as the transformer takes it."""
        (frames,) = batch.feature_cache[PIXELS]
        encoded = self.vae.encoder(frames[:, :, start:stop], feat_cache=batch.feature_cache[ENCODER], feat_idx=[0])
        mode: Tensor = self.vae.quant_conv(encoded).chunk(2, dim=1)[0].to(self.config.latent_dtype or encoded.dtype)
        scale, shift = self.config.get_decode_scale_and_shift(mode)
        batch.image_latents.append((mode - shift) * scale)


class CausalVAEDecodingStage(DecodingStage):
    """Decodes one latent frame at a time, with a boundary between two."""

    def __init__(self, vae: Any, config: PipelineConfig) -> None:
        super().__init__(vae, config)
        self.decoder = CausalDecoder(vae)

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `outputs` with the one video [T, H, W, C], or the latents [C, T, H, W]."""
        assert batch.latents is not None
        batch.latents = self.config.post_denoising_loop(batch.latents, batch)
        check_finite(batch.latents, "latents")
        if batch.params.output_type == "latent":
            batch.outputs.append(batch.latents[0].cpu())
            return
        for index in range(batch.latents.shape[2]):
            if index:
                yield []
            self._decode(batch, index)
        batch.feature_cache = {}
        batch.outputs = [torch.cat(batch.outputs)]

    def _decode(self, batch: Req, index: int) -> None:
        """Append the frames of a latent frame, [1, H, W, C] each."""
        assert isinstance(batch.latents, Tensor)
        latents = batch.latents[:, :, index : index + 1].to(self.vae.device, self.vae.dtype)
        scale, shift = self.config.get_decode_scale_and_shift(latents)
        for frame in self.decoder.decode(latents / scale + shift, batch.feature_cache):
            check_finite(frame, "pixels")
            batch.outputs.append(to_media(frame[0], batch.params.output_type)[None])
