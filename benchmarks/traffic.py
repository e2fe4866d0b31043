"""What a forward of a transformer sends in a layout, by formula: calls and bytes of one rank, for each axis.

Notation: `n` tokens a rank has, `T` replicated tokens, `C` width, `A` attention layers over all tokens; `P` ranks of
the sequence, `U` and `R` of Ulysses and the ring, `t` of tensor parallelism. What a rank keeps is not counted.

| axis | calls | elements sent |
|---|---|---|
| ulysses | 2 A | A (U-1)/U (3 n C/t + (n + T) C/t) |
| ring | A (R-1) | A (R-1) 2 n C/t |
| sequence | 1 | (P-1) n C_out |
| tp | one a row-divided layer, a gathered one, a norm over ranks | 2 (t-1)/t a sum's, (t-1)/t a gathered result's |
| cfg | one a round with several branches, a step | (cfg-1) of a result |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safelight.parallel.layout import ParallelLayout

Sent = dict[str, tuple[int, float]]
"""For each axis, the calls and the bytes that rank 0 sends."""


@dataclass(frozen=True)
class Shape:
    """A transformer, as far as its traffic goes.

    Attributes:
        width: channels of a token inside.
        out_channels: of a token of the result.
        num_blocks: with two streams, or with cross-attention.
        num_single_blocks: with one stream.
        is_joint: whether text and picture attend together.

    """

    width: int
    out_channels: int
    num_blocks: int
    num_single_blocks: int
    is_joint: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Return it of a `transformer/config.json`."""
        patch = config.get("patch_size", 1)
        volume = math.prod(patch) if isinstance(patch, Sequence) else patch**2
        return cls(
            width=config["num_attention_heads"] * config["attention_head_dim"],
            out_channels=volume * (config.get("out_channels") or config["in_channels"]),
            num_blocks=config["num_layers"],
            num_single_blocks=config.get("num_single_layers", 0),
            is_joint="joint_attention_dim" in config,
        )


@dataclass(frozen=True)
class Forward:
    """The tokens of one call.

    Attributes:
        lengths: of each divided part; the first has a result.
        text: text tokens.
        images: tokens of image embeddings beside the text.
        groups: runs of tokens that have a timestep of their own.

    """

    lengths: tuple[int, ...]
    text: int
    images: int = 0
    groups: int = 1


def sent_by_forward(shape: Shape, forward: Forward, layout: ParallelLayout, element_size: int = 4) -> Sent:
    """Return what rank 0 sends in one forward."""
    pieces = [-(-length // layout.num_shards) for length in forward.lengths]
    own, replicated = sum(pieces), forward.text if shape.is_joint else 0
    layers, width = shape.num_blocks + shape.num_single_blocks, shape.width // layout.tp
    ulysses, ring = layout.ulysses, layout.ring
    elements: Sent = {}
    if ulysses > 1:
        elements["ulysses"] = 2 * layers, layers * (ulysses - 1) / ulysses * width * (4 * own + replicated)
    if ring > 1:
        elements["ring"] = layers * (ring - 1), layers * (ring - 1) * 2 * own * width
    if layout.num_shards > 1:
        elements["sequence"] = 1, (layout.num_shards - 1) * pieces[0] * shape.out_channels
    if layout.tp > 1:
        by_tensor = _joint_tensor_parallel if shape.is_joint else _cross_tensor_parallel
        elements["tp"] = by_tensor(shape, forward, own, layout)
    return {axis: (calls, count * element_size) for axis, (calls, count) in elements.items()}


def sent_by_step(results: Sequence[int], layout: ParallelLayout, element_size: int = 4) -> Sent:
    """Return what joins the branches of a step, given the elements of each result."""
    rounds = [results[begin : begin + layout.cfg] for begin in range(0, len(results), layout.cfg)]
    joined = [entry[0] for entry in rounds if len(entry) > 1 and layout.cfg > 1]
    return {"cfg": (len(joined), (layout.cfg - 1) * sum(joined) * element_size)} if joined else {}


def _joint_tensor_parallel(shape: Shape, forward: Forward, own: int, layout: ParallelLayout) -> tuple[int, float]:
    """Attention and MLP of two streams, each with its modulation; then attention and MLP in one; a last norm."""
    share, both = (layout.tp - 1) / layout.tp * shape.width, own + forward.text
    block = 2 * 2 * share * both + 6 * share * (forward.groups + 1)
    single = 2 * share * both + 3 * share
    calls = 6 * shape.num_blocks + 2 * shape.num_single_blocks + 1
    return calls, shape.num_blocks * block + shape.num_single_blocks * single + 2 * share


def _cross_tensor_parallel(shape: Shape, forward: Forward, own: int, layout: ParallelLayout) -> tuple[int, float]:
    """Self-attention, cross-attention and MLP; sums of squares for their norms; the modulation of all blocks once."""
    share = (layout.tp - 1) / layout.tp
    run = sum(forward.lengths) // forward.groups
    is_divided = layout.num_shards > 1 and forward.groups > 1
    groups = own // math.gcd(own, run) if is_divided else forward.groups
    squares = 3 * own + forward.text + forward.images
    block = 2 * share * (3 * own * shape.width + squares)
    calls = shape.num_blocks * (8 if forward.images else 7) + 1
    return calls, shape.num_blocks * block + share * groups * 6 * shape.width
