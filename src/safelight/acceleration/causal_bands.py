"""Decoding in bands with a causal video VAE, whose norms are over the channels of a pixel.

What its decoder remembers of the frames before is most of its memory. So the blocks before the first doubling, whose
attention is over whole frames, run first, for all latent frames; they are small. Then each band of rows goes through
the rest of the decoder by itself, all its frames, and remembers only its own rows. It is given as many rows beyond its
own as the convolutions look at; behind each block those that lack their neighbours are cut off. Results are the same up
to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safelight.layers.bands import cuts
from safelight.layers.causal_vae import CausalDecoder, upsamplers_of
from safelight.stages.vae import Decoder, Piece, State, Unit

BAND_ROWS, LEAST_BANDS = 128, 2
"""A band of the picture has at most so many rows, and a picture is at least so many bands."""
PARTS = {"nonlinearity", "conv_in", "mid_block", "up_blocks", "norm_out", "conv_out"}
BLOCK_PARTS = {"resnets", "upsamplers", "upsampler", "avg_shortcut", "nonlinearity"}
"""What a decoder, and a block behind its attention, are made of."""
TRUNK, CACHE = "trunk", "cache"
"""Places in the state: a frame for each latent frame; and a feature cache, of the blocks before the first doubling,
then of the band that is decoded."""


class CausalBandDecoder(Decoder):
    """The walk over the decoder of one of the libraries' causal VAEs.

    Args:
        vae: the library's module. The memory of its decoder's weights is rearranged, their values stay.
        rows: of the picture, that a band has at most.

    """

    def __init__(self, vae: Any, rows: int | None = None) -> None:
        self.walk = CausalDecoder(vae)
        self.levels = [Level(block) for block in vae.decoder.up_blocks]
        self._rows = rows

    @staticmethod
    def why_not(vae: Any) -> str | None:
        """Return what a VAE has that this decoder does not know; None if it can decode with it."""
        decoder = vae.decoder
        parts = {name for name, _ in decoder.named_children()}
        if parts != PARTS or not all(isinstance(conv, nn.Conv3d) for conv in (decoder.conv_in, decoder.conv_out)):
            return "its decoder is of another kind"
        if {name for name, _ in decoder.norm_out.named_parameters()} != {"gamma"}:
            return "its norms are of another kind"
        others = {name for block in decoder.up_blocks for name, _ in block.named_children()} - BLOCK_PARTS
        return f"its blocks have {', '.join(sorted(others))}" if others else None

    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return [C, T, H, W], for latents [1, C, T, H, W]."""
        return self.walk.output_shape(latent_shape)

    def begin(self, latents: Tensor) -> State:
        """Return the state of latents [1, C, T, H, W]."""
        num_frames = latents.shape[2]
        return {
            TRUNK: [latents[:, :, index : index + 1] for index in range(num_frames)],
            CACHE: [{} if num_frames > 1 else None],
        }

    def units(self, latent_shape: Sequence[int]) -> Iterator[Unit]:
        """Yield the units: the latent frames up to the first doubling, then a band of a latent frame, band by band."""
        num_latent_frames, height, width = latent_shape[-3:]
        weights = num_weights(self.walk.decoder.conv_in) + num_weights(self.walk.decoder.mid_block)
        for index in range(num_latent_frames):
            yield Unit(weights * height * width, partial(self._trunk, index))
        full_height = self.output_shape(latent_shape)[2] // self.walk.patch_size
        most = self._rows or min(BAND_ROWS, -(-full_height * self.walk.patch_size // LEAST_BANDS))
        for top, bottom in cuts(full_height, max(1, most // self.walk.patch_size)):
            needed = self.needed_rows(top, bottom, height)
            for index in range(num_latent_frames):
                cost = self._cost(needed, width, first=index == 0)
                yield Unit(cost, partial(self._band, index, top, bottom, needed))

    def needed_rows(self, top: int, bottom: int, height: int) -> list[tuple[int, int]]:
        """Return the rows that each block must be given, and then those that it must make, for rows of the picture.

        Args:
            top: the first row, in the decoder's own pixels.
            bottom: the one after the last.
            height: of the latents.

        """
        heights = [height]
        for level in self.levels:
            heights.append(heights[-1] * level.scale)
        needed = [clamped(top - 1, bottom + 1, heights[-1])]  # the last convolution looks at one neighbour
        for level, limit in zip(reversed(self.levels), reversed(heights[:-1]), strict=True):
            first, stop = needed[0]
            if level.scale == 2:
                first, stop = (first - 1) // 2, stop // 2 + 1  # the pixels of which the rows' neighbours are doubles
            needed.insert(0, clamped(first - level.reach, stop + level.reach, limit))
        return needed

    def _kept(self, top: int, bottom: int, needed: Sequence[tuple[int, int]]) -> list[slice]:
        """Return the rows to keep of what each block makes of the rows that it is given, and of the last convolution.

        They are counted from the first row that there is.
        """
        kept = []
        for level, given, (first, stop) in zip(self.levels, needed[:-1], needed[1:], strict=True):
            begin = given[0] * level.scale
            kept.append(slice(first - begin, stop - begin))
        begin = needed[-1][0]
        return [*kept, slice(top - begin, bottom - begin)]

    def _trunk(self, index: int, state: State) -> Sequence[Piece]:
        """Replace a latent frame by what the blocks before the first doubling make of it."""
        (cache,) = state[CACHE]
        state[TRUNK][index] = self.walk.trunk(state[TRUNK][index], cache)
        if cache is not None and index + 1 == len(state[TRUNK]):
            state[CACHE] = [{}]
        return ()

    def _band(
        self, index: int, top: int, bottom: int, needed: Sequence[tuple[int, int]], state: State
    ) -> Sequence[Piece]:
        """Return a band of the frames of a latent frame."""
        (cache,) = state[CACHE]
        first, stop = needed[0]
        rows = state[TRUNK][index][:, :, first:stop].clone(memory_format=torch.channels_last)
        frames = list(self.walk.pixels(rows, index == 0, cache, self._kept(top, bottom, needed)))
        if cache is not None and index + 1 == len(state[TRUNK]):
            state[CACHE] = [{}]
        return [Piece(self.walk.first_frame(index), top * self.walk.patch_size, torch.stack(frames, dim=2)[0])]

    def _cost(self, needed: Sequence[tuple[int, int]], width: int, first: bool) -> int:
        """Return about how many multiplications a band of a latent frame takes."""
        cost, num_frames = 0, 1
        for level, (top, bottom) in zip(self.levels, needed[:-1], strict=True):
            cost += level.num_weights * (bottom - top) * width * num_frames
            num_frames *= 1 if first or not level.doubles_frames else 2
            width *= level.scale
        return cost


class Level:
    """What a block does to the size of its input, and how far it looks.

    Attributes:
        scale: 2 if it doubles rows and columns.
        doubles_frames: whether it doubles frames too.
        reach: rows above and below a row that its residual blocks look at: one for each of two convolutions.
        num_weights: of its convolutions.

    """

    def __init__(self, block: Any) -> None:
        upsamplers = upsamplers_of(block)
        self.scale = 2 if upsamplers else 1
        self.doubles_frames = any(upsampler.mode == "upsample3d" for upsampler in upsamplers)
        self.reach = 2 * len(block.resnets)
        self.num_weights = num_weights(block)


def num_weights(module: nn.Module) -> int:
    """Return how many weights the convolutions of a module have."""
    parts = (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    return sum(part.weight.numel() for part in parts)


def clamped(first: int, stop: int, limit: int) -> tuple[int, int]:
    """Return the rows of a range that there are."""
    return max(first, 0), min(stop, limit)
