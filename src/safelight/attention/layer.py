"""The attention layer: all that a model knows of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from safelight.attention.backends import BACKENDS, AttentionBackend, select_backend
from safelight.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What a call of attention is given besides query, key and value.

    Attributes:
        attn_mask: broadcastable to [B, H, S, S]; True (or 0.0) where a key is seen.

    """

    attn_mask: Tensor | None = None


NO_MASK = AttentionMetadata()

AttentionStrategy = Callable[["Attention", Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of a layer to queries, keys and values of this device's tokens, each [B, S, H, D], with a mask or None."""


class Attention(nn.Module):
    """Scaled dot-product attention over [B, S, H, D].

    It has no parameters. Its backend is chosen from outside, and so is its strategy: where its tokens are.

    Args:
        num_heads: heads of the query.
        head_size: channels of one head.
        causal: whether a token sees only those before it.
        softmax_scale: factor of the scores; 1/sqrt(head_size) if None.
        num_kv_heads: heads of key and value, a divisor of `num_heads`; `num_heads` if None.

    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool = False,
        softmax_scale: float | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        assert num_heads % (num_kv_heads or num_heads) == 0, "num_heads is a multiple of num_kv_heads"
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.backend = BACKENDS["sdpa"]
        self.masked_backend: AttentionBackend | None = BACKENDS["sdpa"]
        self.strategy: AttentionStrategy = attend_locally

    def forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata = NO_MASK) -> Tensor:
        """Return [B, S, H, D]."""
        return self.strategy(self, query, key, value, metadata.attn_mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, S, H, D], of queries to the keys that are here."""
        backend = self.backend if mask is None else self.masked_backend
        if backend is None:
            raise InvalidParameterError("attention_backend", self.backend.name, "one that takes a mask, for this model")
        attended = backend(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, self.causal, self.softmax_scale
        )
        return attended.transpose(1, 2)


def attend_locally(layer: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return [B, S, H, D] where all tokens are on this device."""
    return layer.attend(query, key, value, mask)


def set_attention_backend(module: nn.Module, name: str, device_type: str, dtype: torch.dtype) -> None:
    """Choose the backend of every attention layer below `module`, once, so that a forward has nothing to choose.

    Calls with a mask may get another backend under `auto`; under a name that takes none they are refused.

    Args:
        module: whose layers are set.
        name: `auto`, or a name in `BACKENDS`.
        device_type: on which it will run, such as `cuda`.
        dtype: of query, key and value.

    Raises:
        InvalidParameterError: if there is no such backend, or it cannot compute this model here.
        MissingDependencyError: if the backend needs a package that is missing.

    """
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.backend = select_backend(name, device_type, dtype, False, layer.head_size)
            layer.masked_backend = backend_for_masks(name, device_type, dtype, layer.head_size)


@cache
def backend_for_masks(name: str, device_type: str, dtype: torch.dtype, head_size: int) -> AttentionBackend | None:
    """Return the backend for calls with a mask; None where the one asked for takes none, which only a mask reveals."""
    try:
        return select_backend(name, device_type, dtype, True, head_size)
    except InvalidParameterError:
        return None
