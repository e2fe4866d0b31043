"""What a network's JSON says of how its work grows with the tokens. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

NETWORKS = ("transformer", "transformer_2", "unet", "prior")
"""Components that run at every step, by their names in an index; the first that is there is asked."""
HEADS = (("num_attention_heads", "attention_head_dim"), ("num_heads", "head_dim"))
"""Settings whose product is a network's width."""
WIDTHS = ("hidden_size", "dim", "inner_dim", "block_out_channels")
"""Settings that are a width; of several the last, where a UNet has most of its attention."""
MLP_WIDTHS = ("ffn_dim", "intermediate_size")
USUAL_MLP = 4
"""Widths of an MLP, where the JSON does not say."""
UNKNOWN_WIDTH = 1024
"""Of a network whose JSON says nothing: the narrower, the sooner attention is what counts."""


@dataclass(frozen=True)
class Architecture:
    """A network's measures.

    Attributes:
        width: channels of a token.
        mlp_width: the same inside the MLPs.

    """

    width: int
    mlp_width: int

    @property
    def balance(self) -> int:
        """Return the tokens of a sequence at which attention takes as much work as all else.

        A block multiplies a token by 4 width² weights around attention and 2 width x mlp_width in its MLP, at two
        operations each; attention takes 4 width operations for each token that a token looks at.
        """
        return 2 * self.width + self.mlp_width

    @property
    def values_per_token(self) -> int:
        """Return how many values of a token a forward holds at once, at the very least: inside an MLP."""
        return self.width + self.mlp_width

    @classmethod
    def of(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return what the components' JSON says, by their names."""
        config = next((component_configs[name] for name in NETWORKS if name in component_configs), {})
        products = [_number(config.get(heads)) * _number(config.get(size)) for heads, size in HEADS]
        width = max(*products, *(_number(config.get(name)) for name in WIDTHS)) or UNKNOWN_WIDTH
        mlp_width = max(_number(config.get(name)) for name in MLP_WIDTHS) or USUAL_MLP * width
        return cls(width, mlp_width)


def _number(value: Any) -> int:
    """Return a positive whole number, or the last of several; 0 for anything else."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[-1]
    return value if isinstance(value, int) and value > 0 else 0
