"""Decoding in bands with a VAE whose norms are over the whole picture: `AutoencoderKL`.

The decoder runs layer by layer, each layer band by band. The moments of what a layer makes are summed while it is made,
so that the norm of the next layer is known when its first band begins. A convolution takes a row from each neighbouring
band, so that no row is convolved twice, and a band is freed when the layer has no more use for it: a layer needs one
activation and a few bands, where an undivided one needs three activations. Results are the same up to the order of
sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.layers.bands import Bands, cuts
from safelight.layers.convolution import convolve_with_channels_last, doubled_conv
from safelight.stages.vae import Decoder, Piece, State, Unit

BAND_ROWS, LEAST_BANDS = 32, 16
"""A band of the picture has at most so many rows, and a picture is at least so many bands."""
INPUT, OUTPUT, HIDDEN, SHORTCUT = "input", "output", "hidden", "shortcut"
"""Places in the state: what a layer or block is given; what a layer makes of it; between the two convolutions of a
block, what the first makes and, where the block changes the number of channels, what its input becomes."""

Work = Callable[[State, int, int, int], Sequence[Piece]]
"""Makes the rows from one to another of so many in all."""


class GroupNormBandDecoder(Decoder):
    """The walk over the decoder of the libraries' `AutoencoderKL`.

    Args:
        vae: the library's module. The memory of its decoder's weights is rearranged, their values stay.
        rows: of the picture, that a band has at most where the decoder is widest; elsewhere a band has as many values.

    """

    def __init__(self, vae: Any, rows: int | None = None) -> None:
        self.vae = vae
        self.decoder = vae.decoder
        self.num_groups: int = self.decoder.conv_norm_out.num_groups
        self.doublings = sum(block.upsamplers is not None for block in self.decoder.up_blocks)
        self.widest: int = self.decoder.up_blocks[-1].resnets[0].in_channels
        self._rows = rows
        convolve_with_channels_last(self.decoder)

    @staticmethod
    def why_not(vae: Any) -> str | None:
        """Return what an `AutoencoderKL` has that this decoder does not know; None if it can decode with it."""
        others = sorted(set(vae.config["up_block_types"]) - {"UpDecoderBlock2D"})
        if others:
            return f"it has blocks of the kind {', '.join(others)}"
        activation = vae.config["act_fn"]
        return None if activation in ("silu", "swish") else f"its activation is {activation!r}"

    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return [C, 1, H, W], for latents [1, C, H, W]."""
        height, width = (side << self.doublings for side in latent_shape[-2:])
        return self.decoder.conv_out.out_channels, 1, height, width

    def begin(self, latents: Tensor) -> State:
        """Return the state of latents [1, C, H, W]."""
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        return {INPUT: [Bands(bands=[latents.contiguous(memory_format=torch.channels_last)])]}

    def units(self, latent_shape: Sequence[int]) -> Iterator[Unit]:
        """Yield the units: bands of a layer, layer by layer."""
        height, width = latent_shape[-2:]
        _, _, full_height, full_width = self.output_shape(latent_shape)
        rows = self._rows or min(BAND_ROWS, -(-full_height // LEAST_BANDS))
        most = rows * full_width * self.widest
        decoder, mid, of_doubled = self.decoder, self.decoder.mid_block, partial(doubled_conv, halo=1)
        yield from self._layer(partial(self._conv, conv_of), decoder.conv_in, height, width, most)
        yield from self._resnet(mid.resnets[0], height, width, most)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                size = height * width
                yield Unit(size * size * 2 * attention.inner_dim, partial(self._attention, attention))
            yield from self._resnet(resnet, height, width, most)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                yield from self._resnet(resnet, height, width, most)
            for upsampler in block.upsamplers or ():
                yield from self._layer(partial(self._conv, of_doubled), upsampler.conv, height, width, most // 4)
                height, width = 2 * height, 2 * width
        yield from self._layer(self._last_conv, decoder.conv_out, height, width, most)

    def _layer(
        self, work: Callable[..., Sequence[Piece]], conv: Any, height: int, width: int, most: int
    ) -> Iterator[Unit]:
        """Yield a layer's units, each of at most so many values of input or output, but of a row at least."""
        row = width * max(conv.in_channels, conv.out_channels)
        for top, bottom in cuts(height, max(1, most // row)):
            cost = (bottom - top) * width * conv.weight.numel()
            yield Unit(cost, partial(work, conv, top, bottom, height))

    def _resnet(self, resnet: Any, height: int, width: int, most: int) -> Iterator[Unit]:
        """Yield the units of two convolutions, each after norm and activation, added to what the block was given."""
        for half, conv in ((self._first_half, resnet.conv1), (self._second_half, resnet.conv2)):
            yield from self._layer(lambda _, *cut, half=half: half(resnet, *cut), conv, height, width, most)

    def _conv(
        self, convolve: Callable[[Any, Tensor], Tensor], conv: Any, top: int, bottom: int, height: int, state: State
    ) -> Sequence[Piece]:
        """Make rows of a convolution of the input: of its pixels, or of those that each of them stands for."""
        (given,) = state[INPUT]
        self._append(state, OUTPUT, convolve(conv, padded(given, top, bottom, height)))
        return self._finish(state, OUTPUT, bottom, height)

    def _last_conv(self, conv: Any, top: int, bottom: int, height: int, state: State) -> Sequence[Piece]:
        """Make rows of the picture."""
        (given,) = state[INPUT]
        pixels = conv_of(conv, padded(given, top, bottom, height, self.decoder.conv_norm_out))
        given.release(bottom - 1)
        return [Piece(0, top, pixels.transpose(0, 1))]

    def _attention(self, attention: Any, state: State) -> Sequence[Piece]:
        """Replace the input by what attention, each pixel with each, makes of it: whole, as it is small here."""
        (given,) = state[INPUT]
        state[INPUT] = [Bands()]
        self._append(state, INPUT, attention(given.rows(0, sum(band.shape[2] for band in given.bands))))
        return ()

    def _first_half(self, resnet: Any, top: int, bottom: int, height: int, state: State) -> Sequence[Piece]:
        """Make rows of a block's first convolution, and of what its input becomes if it changes its channels."""
        (given,) = state[INPUT]
        self._append(state, HIDDEN, conv_of(resnet.conv1, padded(given, top, bottom, height, resnet.norm1)))
        if resnet.conv_shortcut is None:
            return ()
        state.setdefault(SHORTCUT, [Bands()])[0].bands.append(resnet.conv_shortcut(given.rows(top, bottom)))
        return self._finish(state, SHORTCUT, bottom, height)

    def _second_half(self, resnet: Any, top: int, bottom: int, height: int, state: State) -> Sequence[Piece]:
        """Add rows of a block's second convolution to its input, in place."""
        (given,), (hidden,) = state[INPUT], state[HIDDEN]
        made = conv_of(resnet.conv2, padded(hidden, top, bottom, height, resnet.norm2))
        hidden.release(bottom - 1)
        if top == 0:
            given.moments = None  # those of what it was
        row = 0
        for rows in given.views(top, bottom):
            rows += made[:, :, row : row + rows.shape[2]]
            given.moments = merged(given.moments, moments_of(rows, self.num_groups))
            row += rows.shape[2]
        if bottom == height:
            del state[HIDDEN]
        return ()

    def _append(self, state: State, place: str, band: Tensor) -> None:
        """Put a band below the others of a place, and count its values."""
        (bands,) = state.setdefault(place, [Bands()])
        bands.bands.append(band)
        bands.moments = merged(bands.moments, moments_of(band, self.num_groups))

    def _finish(self, state: State, place: str, bottom: int, height: int) -> Sequence[Piece]:
        """Let go of the input that no later band needs; with the last band, what was made becomes the input."""
        state[INPUT][0].release(bottom - 1)
        if bottom == height:
            state[INPUT] = state.pop(place)
        return ()


def padded(given: Bands, top: int, bottom: int, height: int, norm: nn.GroupNorm | None = None) -> Tensor:
    """Return rows with one neighbour on either side, which is zero beyond the picture, [1, C, bottom - top + 2, W].

    Where there is a norm, they are of its SiLU.
    """
    above, below = min(top, 1), min(height - bottom, 1)
    rows = given.rows(top - above, bottom + below)
    if norm is not None:
        assert given.moments is not None
        rows = F.silu(normalised(rows, norm, given.moments), inplace=True)
    return rows if above and below else F.pad(rows, (0, 0, 1 - above, 1 - below))


def conv_of(conv: Any, rows: Tensor) -> Tensor:
    """Return a convolution of rows that have one neighbour on either side, [1, C_out, rows, W]."""
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def normalised(rows: Tensor, norm: nn.GroupNorm, moments: Tensor) -> Tensor:
    """Return the group norm of rows [1, C, rows, W] by the moments of the whole; computed in float32.

    With known moments it is a batch norm, each channel's mean and variance being its group's.
    """
    count, mean, squares = moments
    per_group = norm.num_channels // norm.num_groups
    mean, variance = (values.float().repeat_interleave(per_group) for values in (mean, squares / count))
    return F.batch_norm(rows, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)


def moments_of(rows: Tensor, num_groups: int) -> Tensor:
    """Return number, mean and sum of squared distances from it, [3, G] float64, of rows [1, C, rows, W]."""
    groups = (num_groups, -1)
    count = rows.numel() // num_groups
    mean = rows.sum((0, 2, 3), dtype=torch.float32).view(groups).sum(1, dtype=torch.float64) / count
    distances = rows - mean.float().repeat_interleave(rows.shape[1] // num_groups)[:, None, None]
    squares = distances.square_().sum((0, 2, 3)).view(groups).sum(1, dtype=torch.float64)
    return torch.stack((torch.full_like(mean, count), mean, squares))


def merged(one: Tensor | None, other: Tensor) -> Tensor:
    """Return the moments of two sets of values from those of each.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979: no
    difference of large sums is taken, which would lose the variance of values far from zero.
    """
    if one is None:
        return other
    count = one[0] + other[0]
    distance = other[1] - one[1]
    mean = one[1] + distance * (other[0] / count)
    squares = one[2] + other[2] + distance.square() * (one[0] * other[0] / count)
    return torch.stack((count, mean, squares))
