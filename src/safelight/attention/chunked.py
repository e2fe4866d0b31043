"""Attention on the CPU in bfloat16, a chunk of queries after the other, for processors with bfloat16 instructions.

There torch's own kernel gains nothing from bfloat16. Here scores are float32 products by oneDNN, where torch's kernel
takes MKL, softmax is float32, and the weighted sum of values is a bfloat16 product accumulated in float32. Nothing is
rounded that torch's kernel does not round: scores in bfloat16 would be faster still, and two to five times as far from
the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 256
"""Queries of a chunk. Its scores take a kilobyte a key, which for some thousand keys stays in the cache."""


def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Compute attention on [B, H, S, D], bfloat16 on the CPU; keys and values may have fewer heads, by a whole factor.

    Args:
        query: [B, H, S, D].
        key: [B, H_kv, S_kv, D].
        value: [B, H_kv, S_kv, D_v].
        mask: broadcastable to [B, H, S, S_kv]: bool, True where a key is seen, or what is added to the scores. A query
            that sees no key gets zeros.
        causal: whether query i sees keys 0 to i alone.
        scale: factor of the scores; 1/sqrt(D) if None.

    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = _attend(query, key, value, mask, causal, factor)
    return attended


def wins_here() -> bool:
    """Return whether it is faster than torch's kernel: with bfloat16 instructions, but without a matrix unit.

    torch's kernel uses matrix units (AMX) itself.
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


@torch.library.custom_op("safelight::chunked_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Compute; one operator, so that a compiler sees no loop."""
    batch, num_heads, num_queries, _ = query.shape
    attended = _empty_like_heads(query, value)
    seen = None if mask is None else mask.expand(batch, num_heads, num_queries, key.shape[2])
    groups = num_heads // key.shape[1]
    for row in range(batch):
        for kv_head in range(key.shape[1]):
            scaled_key, its_value = key[row, kv_head].float() * scale, value[row, kv_head].contiguous()
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                its_mask = None if seen is None else seen[row, head]
                for first in range(0, num_queries, CHUNK):
                    chunk = slice(first, first + CHUNK)
                    probabilities = _probabilities(query[row, head, chunk], scaled_key, its_mask, causal, first)
                    attended[row, head, chunk] = probabilities @ its_value[: probabilities.shape[1]]
    return attended


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return _empty_like_heads(query, value)


def _empty_like_heads(query: Tensor, value: Tensor) -> Tensor:
    """Return memory for [B, H, S, D_v] in which the heads of a token lie together, as the next layer reads them."""
    batch, num_heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)


def _probabilities(chunk: Tensor, scaled_key: Tensor, mask: Tensor | None, causal: bool, first: int) -> Tensor:
    """Return how much each query of a chunk, [S, D], sees of each key, bfloat16; keys that none sees are left out."""
    last = first + chunk.shape[0]
    keys = scaled_key[:last] if causal else scaled_key
    scores: Tensor = torch.ops.mkldnn._linear_pointwise(chunk.float(), keys, None, "none", [], "")
    if causal:
        positions = torch.arange(first, last)[:, None]
        scores.masked_fill_(positions < torch.arange(keys.shape[0]), float("-inf"))
    if mask is not None:
        its_mask = mask[first:last, : keys.shape[0]]
        scores = scores.masked_fill(~its_mask, float("-inf")) if its_mask.dtype is torch.bool else scores + its_mask
        return torch.ops.aten._safe_softmax(scores, -1).to(chunk.dtype)  # type: ignore[no-any-return]
    return scores.softmax(-1).to(chunk.dtype)
