"""Latents to pixels in bands of rows, with boundaries between them; what a band leaves lies in the request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.layers.bands import BandDecoder, Unit
from safelight.stages.decoding import DecodingStage, check_finite, to_media

UNIT_COST = 2**36
"""Multiplications between two boundaries, unless one unit has more: a second of a processor's core, or a millisecond of
an accelerator."""


class BandedDecodingStage(PipelineStage):
    """Decodes in bands. What it fills in is what the undivided stage does, up to the order of sums.

    Args:
        undivided: the stage in whose place it is.
        decoder: of its VAE.
        unit_cost: multiplications between two boundaries, unless one unit has more.

    """

    def __init__(self, undivided: DecodingStage, decoder: BandDecoder, unit_cost: int = UNIT_COST) -> None:
        self.undivided = undivided
        self.decoder = decoder
        self.unit_cost = unit_cost

    def needed_modules(self, batch: Req) -> Sequence[nn.Module]:
        """Return the VAE, unless latents are asked for."""
        return self.undivided.needed_modules(batch)

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `outputs`: pictures [H, W, C] or videos [T, H, W, C], uint8 for `pil` and float32 in [0, 1] otherwise.

        For `latent` they are what the undivided stage gives.
        """
        if batch.params.output_type == "latent":
            yield from self.undivided.run(batch, server_args)
            return
        cost = 0
        for index in range(self._num_pictures(batch)):
            for unit in self.decoder.units(self._begin(batch, index)):
                if cost and cost + unit.cost > self.unit_cost:
                    yield []
                    cost = 0
                cost += unit.cost
                self._work(batch, unit)
            self._finish(batch)

    def _latents(self, batch: Req) -> Tensor:
        """Return the latents as the VAE takes them, [B, C, H, W] or [B, C, T, H, W]."""
        assert batch.latents is not None
        for part in batch.latents if isinstance(batch.latents, tuple) else (batch.latents,):
            check_finite(part, "latents")
        vae, config = self.undivided.vae, self.undivided.config
        latents = config.post_denoising_loop(batch.latents, batch).to(vae.device, vae.dtype)
        scale, shift = config.get_decode_scale_and_shift(latents)
        return latents / scale + shift

    def _num_pictures(self, batch: Req) -> int:
        return self._latents(batch).shape[0]

    def _begin(self, batch: Req, index: int) -> tuple[int, ...]:
        """Lay out the output and the decoder's state; return the shape of the latents of one."""
        latents = self._latents(batch)[index : index + 1]
        channels, *sizes = self.decoder.output_shape(latents.shape)
        dtype = torch.uint8 if batch.params.output_type == "pil" else torch.float32
        batch.outputs.append(torch.empty((*sizes, channels), dtype=dtype))
        batch.feature_cache = self.decoder.begin(latents)
        return tuple(latents.shape)

    def _work(self, batch: Req, unit: Unit) -> None:
        """Do a unit, and put the pixels that it finishes into their place."""
        media = batch.outputs[-1]  # T H W C
        for piece in unit.run(batch.feature_cache):
            check_finite(piece.pixels, "pixels")
            num_frames, rows = piece.pixels.shape[1:3]
            place = media[piece.frame : piece.frame + num_frames, piece.top : piece.top + rows]
            place.copy_(to_media(piece.pixels, batch.params.output_type))

    def _finish(self, batch: Req) -> None:
        """Forget the decoder's state; a picture has no frames."""
        batch.feature_cache = {}
        if not self.undivided.config.task.makes_video:
            batch.outputs[-1] = batch.outputs[-1][0]
