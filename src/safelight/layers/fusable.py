"""Layers whose computation can be exchanged from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class FusableLayer(nn.Module):
    """A layer that computes by one function of tensors, which may be exchanged for another of the same signature.

    Args:
        plain: the function in plain torch: the reference for every other.
        sizes: what its work is sized by besides batch and tokens; layers with equal sizes compute alike.

    Attributes:
        operation: the function that `forward` calls; `plain` at first.

    """

    operation: Callable[..., Any]

    def __init__(self, plain: Callable[..., Any], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.plain = plain
        self.operation = plain
        self.sizes = sizes
