"""Latents to pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.core.calls import ModelCall
from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.errors import NonFiniteOutputError
from safelight.stages.vae import INPUT, VAE, State

COMPONENT = "vae"


@dataclass
class DecodingState:
    """What is kept between two units of a decode: the VAE's own state."""

    vae: State


class DecodingStage(PipelineStage):
    """Decodes the latents with the VAE. NaN and infinity end the request: they never become a picture."""

    def __init__(self, vae: VAE, config: PipelineConfig) -> None:
        self.vae = vae
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Fill `outputs`: pictures [H, W, C] or videos [T, H, W, C], uint8 for `pil` and float32 in [0, 1] otherwise.

        For `latent` they are the latents, as the model has them at the end of its loop.
        """
        assert batch.latents is not None
        parts = batch.latents if isinstance(batch.latents, tuple) else (batch.latents,)
        for part in parts:
            check_finite(part, "latents")
        if batch.params.output_type == "latent":
            batch.outputs.extend(part[0].cpu() for part in self.config.latent_output(parts, batch))
            return
        del parts, part
        for index in range(self._num_decodes(batch)):
            shape = self._begin(batch, index, server_args)
            for number, units in enumerate(self.vae.calls(shape)):
                self._take(batch, (yield [self._call(batch, number, shape, units)]))
            self._finish(batch)

    def _num_decodes(self, batch: Req) -> int:
        """Return how many decodes there are: one for all pictures where the VAE takes them at once."""
        assert batch.latents is not None
        return 1 if self.vae.decoder is None else self.config.post_denoising_loop(batch.latents, batch).shape[0]

    def _begin(self, batch: Req, index: int, server_args: ServerArgs) -> tuple[int, ...]:
        """Lay out what is decoded, and where its pixels go; return the shape of the latents."""
        assert batch.latents is not None
        dtype = server_args.component_dtype(COMPONENT, self.config.precisions.get(COMPONENT))
        latents = self.config.post_denoising_loop(batch.latents, batch).to(server_args.torch_device(), dtype)
        scale, shift = self.config.get_decode_scale_and_shift(latents)
        latents = latents / scale + shift
        if self.vae.decoder is not None:
            latents = latents[index : index + 1]
            channels, *sizes = self.vae.decoder.output_shape(latents.shape)
            made = torch.uint8 if batch.params.output_type == "pil" else torch.float32
            batch.outputs.append(torch.empty((*sizes, channels), dtype=made))
        batch.stage_state = DecodingState({INPUT: latents})
        return tuple(latents.shape)

    def _call(self, batch: Req, number: int, shape: tuple[int, ...], units: tuple[int, int]) -> ModelCall:
        """Return the call of some units, which takes the VAE's state with it."""
        state, batch.stage_state.vae = batch.stage_state.vae, {}
        kwargs, static = {"state": state}, {"latent_shape": shape, "units": units}
        return ModelCall(COMPONENT, kwargs, {}, None, batch.key("decode", number), static, "decode", batch.model)

    def _take(self, batch: Req, results: list[Any]) -> None:
        """Put the pixels that are finished into their place."""
        pieces, batch.stage_state.vae = results[0]["pieces"], results[0]["state"]
        if isinstance(pieces, Tensor):  # of all pictures, whole
            check_finite(pieces, "pixels")
            if pieces.ndim == 5 and not self.config.task.makes_video:
                pieces = pieces.squeeze(2)  # pictures from a VAE for videos
            batch.outputs.extend(to_media(picture, batch.params.output_type) for picture in pieces)
            return
        media = batch.outputs[-1]  # T H W C
        for piece in pieces:
            check_finite(piece.pixels, "pixels")
            num_frames, rows = piece.pixels.shape[1:3]
            place = media[piece.frame : piece.frame + num_frames, piece.top : piece.top + rows]
            place.copy_(to_media(piece.pixels, batch.params.output_type))

    def _finish(self, batch: Req) -> None:
        """Make a video of one frame a picture, where pictures are made."""
        if self.vae.decoder is not None and not self.config.task.makes_video:
            batch.outputs[-1] = batch.outputs[-1][0]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `NonFiniteOutputError` if the tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NonFiniteOutputError(f"the model made {what} that are not finite; no picture is made of them")


def to_media(pixels: Tensor, output_type: str | None) -> Tensor:
    """Return decoded pixels [C, ..., H, W] in [-1, 1] as [..., H, W, C] on the CPU, rounded to uint8 for `pil`.

    They are rounded where they are: a quarter of the bytes leaves the device.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).movedim(0, -1).float()
    return (unit * 255).round().to(torch.uint8).cpu() if output_type == "pil" else unit.cpu()
