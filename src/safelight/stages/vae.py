"""Encoding and decoding with a VAE in units, so that whoever drives can go on elsewhere between any two.

What is done, and in how many units, is known from shapes alone. What lies between two units is in a state, plain
containers of tensors, so that it may be moved, or dropped, between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from torch import Tensor

State = dict[str, Any]
"""What a decode or encode keeps from one unit to the next. Only the request refers to it, and it may be rebuilt."""
INPUT = "input"
"""Place in the state of what has not begun: the latents, or the pixels."""
UNIT_COST = 2**36
"""Multiplications of a model call, unless one unit has more: a second of a processor's core, or a millisecond of an
accelerator."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of decoded frames.

    Attributes:
        frame: number of the first frame.
        top: number of the first row.
        pixels: [C, T, rows, W], in [-1, 1] but for what the decoder overshoots.

    """

    frame: int
    top: int
    pixels: Tensor


@dataclass(frozen=True)
class Unit:
    """A bounded piece of a decode.

    Attributes:
        cost: multiplications and additions of two numbers, about.
        run: does the work on the state, in place, and returns the pixels that are finished.

    """

    cost: int
    run: Callable[[State], Sequence[Piece]]


class Decoder(Protocol):
    """Decodes the latents of one picture or video. It keeps nothing of a decode."""

    def begin(self, latents: Tensor) -> State:
        """Return the state before the first unit, of latents [1, C, H, W] or [1, C, T, H, W], as the VAE takes them."""

    def units(self, latent_shape: Sequence[int]) -> Iterator[Unit]:
        """Yield the units in order, for latents of this shape."""

    def output_shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape [C, T, H, W] of the pixels, for latents of this shape."""


class Encoder(Protocol):
    """Encodes one picture or clip. It keeps nothing of an encode."""

    def begin(self, pixels: Tensor) -> State:
        """Return the state before the first unit, of pixels [1, C, H, W] or [1, C, T, H, W] in [-1, 1]."""

    def num_units(self, pixel_shape: Sequence[int]) -> int:
        """Return the number of units, for pixels of this shape."""

    def encode(self, state: State, index: int) -> Tensor:
        """Do a unit; return the mode of the posterior, [1, C, ...], of the frames that it is of."""


@dataclass(frozen=True)
class VAE:
    """How a model's VAE is run.

    Attributes:
        encoder: of input images and clips, in units; None where `encode` encodes each at once.
        decoder: in units; None where `decode` decodes all pictures of a request at once.
        encode: the mode of the posterior of pixels, both [1, C, ...]; None where there is an encoder.
        decode: pixels [B, C, ...] of latents [B, C, ...]; None where there is a decoder.
        unit_cost: multiplications of a model call, unless one unit has more.

    """

    encoder: Encoder | None
    decoder: Decoder | None
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    unit_cost: int = UNIT_COST

    def calls(self, latent_shape: Shape) -> Iterator[tuple[int, int]]:
        """Yield, for each model call of a decode, its first unit and the one after its last."""
        if self.decoder is None:
            yield 0, 1
            return
        first = index = cost = 0
        for index, unit in enumerate(self.decoder.units(latent_shape)):
            if cost and cost + unit.cost > self.unit_cost:
                yield first, index
                first, cost = index, 0
            cost += unit.cost
        yield first, index + 1

    def decoded(self, state: State, latent_shape: Shape, units: tuple[int, int]) -> dict[str, Any]:
        """Do some units of a decode: return the state behind them, and the pieces that are finished.

        Args:
            state: behind the units before; before the first, the latents as `INPUT`.
            latent_shape: of what is decoded.
            units: the first, and the one after the last.

        """
        if self.decoder is None:
            assert self.decode is not None, "a VAE decodes in one of two ways"
            return {"state": {}, "pieces": self.decode(state.pop(INPUT))}
        first, stop = units
        state = state if first else self.decoder.begin(state.pop(INPUT))
        work = islice(self.decoder.units(latent_shape), first, stop)
        return {"pieces": [piece for unit in work for piece in unit.run(state)], "state": state}

    def num_encodes(self, pixel_shape: Sequence[int]) -> int:
        """Return the number of units of an encode, each a model call, for pixels of this shape."""
        return 1 if self.encoder is None else self.encoder.num_units(pixel_shape)

    def encoded(self, state: State, index: int) -> dict[str, Any]:
        """Do a unit of an encode: return the state behind it, and the mode of the posterior of its frames.

        Args:
            state: behind the unit before; before the first, the pixels as `INPUT`.
            index: of the unit.

        """
        if self.encoder is None:
            assert self.encode is not None, "a VAE encodes in one of two ways"
            return {"mode": self.encode(state.pop(INPUT)), "state": {}}
        state = state if index else self.encoder.begin(state.pop(INPUT))
        return {"mode": self.encoder.encode(state, index), "state": state}


def whole(vae: Any) -> VAE:
    """Return the library's own way of running one of its VAEs."""
    return VAE(
        encoder=None,
        decoder=None,
        encode=lambda pixels: vae.encode(pixels).latent_dist.mode(),
        decode=lambda latents: vae.decode(latents, return_dict=False)[0],
    )
