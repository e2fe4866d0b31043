"""Attention over tokens that lie on several ranks: Ulysses, the ring, and both at once.

Ulysses (Jacobs et al., 2023, arXiv:2309.14509) exchanges tokens for heads: a rank then has all tokens of some heads. In
the ring (Liu et al., 2023, arXiv:2310.01889) queries stay, keys and values go around, and blocks are joined by their
log-sum-exp. Both at once is USP (Fang & Zhao, 2024, arXiv:2405.07719): Ulysses inside, the ring outside.

Where text and picture attend together, the text is on every rank, before the divided tokens. Its keys count once: in
Ulysses each rank has them for its own heads, in the ring they belong to each rank's own block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.attention import Attention
from safelight.parallel.collectives import Communicator


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one forward lie on the ranks.

    Attributes:
        num_replicated: tokens that stand first on every rank.
        lengths: of each divided part: rank r has the r-th piece of each, one part after the other.
        num_shards: ranks.

    """

    num_replicated: int
    lengths: tuple[int, ...]
    num_shards: int

    @property
    def pieces(self) -> tuple[int, ...]:
        """Tokens of each part that a rank has, padding included."""
        return tuple(-(-length // self.num_shards) for length in self.lengths)

    @property
    def is_padded(self) -> bool:
        """Whether some rank has tokens that are none."""
        return any(length % self.num_shards for length in self.lengths)

    def kept(self, shards: Sequence[int], device: torch.device) -> Tensor | None:
        """Return which of the divided tokens of these ranks, one after the other, are real; None for all."""
        if not self.is_padded:
            return None
        places, begun = [], 0
        for shard in shards:
            for length, piece in zip(self.lengths, self.pieces, strict=True):
                real = min(max(length - shard * piece, 0), piece)
                places.append(torch.arange(begun, begun + real, device=device))
                begun += piece
        return torch.cat(places)


class SequenceParallelAttention:
    """The strategy of attention layers whose tokens are divided. `begin` is called before each forward of the model.

    Args:
        ulysses: ranks that exchange tokens for heads.
        ring: ranks around which keys and values go.
        sequence: both, the ring's index first.

    """

    def __init__(self, ulysses: Communicator, ring: Communicator, sequence: Communicator) -> None:
        self.ulysses = ulysses
        self.ring = ring
        self.sequence = sequence
        self.num_replicated = 0
        self.kept: tuple[Tensor | None, ...] = ()

    def begin(self, layout: TokenLayout, device: torch.device) -> None:
        """Take in where the tokens of the forward that comes lie."""
        self.num_replicated = layout.num_replicated
        first = range(0, self.sequence.size, self.ulysses.size)
        self.kept = tuple(layout.kept(range(begin, begin + self.ulysses.size), device) for begin in first)

    def __call__(self, layer: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, S, H, D] of the same, where S are the replicated tokens and those of this rank."""
        query, key, value = heads_for_tokens((query, key, value), self.num_replicated, self.ulysses)
        masks = self._masks(mask)
        if self.ring.size == 1:
            key, value = (self._real(states, 0) for states in (key, value))
            attended = layer.attend(query, key, value, masks[0])
        else:
            attended = self._around_the_ring(layer, query, key, value, masks)
        return tokens_for_heads(attended, self.num_replicated, self.ulysses)

    def _real(self, states: Tensor, block: int) -> Tensor:
        """Return [B, S, H, D] of a block, the replicated tokens first, without padding."""
        kept = self.kept[block]
        if kept is None:
            return states
        text, tokens = states[:, : self.num_replicated], states[:, self.num_replicated :]
        return torch.cat((text, tokens[:, kept]), dim=1)

    def _around_the_ring(
        self, layer: Attention, query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor | None]
    ) -> Tensor:
        """Return [B, S, H, D]: the own block with the replicated keys first, then the others' without."""
        text = torch.stack((key, value))[:, :, : self.num_replicated]
        travelling = torch.stack((key, value))[:, :, self.num_replicated :]
        joined = JoinedBlocks(query, layer.softmax_scale)
        for step in range(self.ring.size):
            shift = self.ring.start_shift(travelling) if step + 1 < self.ring.size else None
            block = (self.ring.rank - step) % self.ring.size
            kept, mask = self.kept[block], masks[block]
            keys, values = travelling if kept is None else travelling[:, :, kept]
            if step == 0:
                keys, values = torch.cat((text[0], keys), dim=1), torch.cat((text[1], values), dim=1)
            elif mask is not None:
                mask = mask[..., self.num_replicated :]
            joined.add(keys, values, mask)
            if shift is not None:
                travelling = shift.wait()
        return joined.result()

    def _masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """Return for each block the mask of its keys, replicated ones first, given that of this rank's keys."""
        if mask is None:
            return [None] * self.ring.size
        assert mask.shape[-2] == 1, "a mask of divided tokens hides keys, whatever the query"
        own = mask[..., self.num_replicated :].expand(*mask.shape[:-1], -1)
        every = self.sequence.all_gather_list(own)
        blocks: list[Tensor | None] = []
        for block, kept in enumerate(self.kept):
            begin = block * self.ulysses.size
            tokens = torch.cat(every[begin : begin + self.ulysses.size], dim=-1)
            real = tokens if kept is None else tokens[..., kept]
            blocks.append(torch.cat((mask[..., : self.num_replicated], real), dim=-1))
        return blocks


class JoinedBlocks:
    """Attention to keys that come in blocks, by an online softmax (Milakov & Gimelshein, 2018, arXiv:1805.02867).

    Args:
        query: [B, S, H, D].
        scale: of the scores; 1/sqrt(D) if None.

    """

    def __init__(self, query: Tensor, scale: float | None) -> None:
        self.query = query.transpose(1, 2)
        self.scale = scale
        self.attended: Tensor | None = None  # float32 [B, H, S, D]
        self.log_sum = query.new_empty(0)  # float32 [B, H, S], of all keys so far

    def add(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Attend to a block, keys and values [B, S, H, D]; one without keys changes nothing."""
        if key.shape[1] == 0:
            return
        attended, log_sum = attend_with_log_sum(
            self.query, key.transpose(1, 2), value.transpose(1, 2), mask, self.scale
        )
        if self.attended is None:
            self.attended, self.log_sum = attended.float(), log_sum
            return
        # With s = sigmoid(new - old) the sum is old * (1 - s) + new * s.
        share = torch.sigmoid(log_sum - self.log_sum)[..., None]
        self.attended = torch.lerp(self.attended, attended.float(), share)
        self.log_sum = torch.logaddexp(self.log_sum, log_sum)

    def result(self) -> Tensor:
        """Return [B, S, H, D] in the query's dtype."""
        assert self.attended is not None, "a forward has at least one real token"
        return self.attended.to(self.query.dtype).transpose(1, 2)


def attend_with_log_sum(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention [B, H, S, D], and the log of each query's sum of exponentials, float32 [B, H, S].

    torch's fused kernels give both; where none takes the inputs, scores are computed.

    Args:
        query: [B, H, S, D].
        key, value: [B, H_kv, S_kv, D], with a whole fraction of the heads.
        mask: bool, broadcastable to [B, H, S, S_kv], True where a key is seen; or added to the scores; or None.
        scale: of the scores; 1/sqrt(D) if None.

    """
    if key.shape[1] != query.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    if query.device.type == "cpu":
        attended, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return attended, log_sum
    if query.device.type == "cuda" and mask is None and query.dtype in HALF and query.shape[-1] % 8 == 0:
        attended, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, False, False, scale=scale
        )
        return attended, log_sum
    scores = torch.matmul(query, key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1).to(value.dtype), value), scores.logsumexp(-1)


HALF = (torch.float16, torch.bfloat16)


def heads_for_tokens(states: Sequence[Tensor], num_replicated: int, ranks: Communicator) -> list[Tensor]:
    """Exchange tokens for heads, of query, key and value at once.

    Args:
        states: each [B, S, H, D]: replicated tokens, then this rank's; H may differ.
        num_replicated: of which every rank has all.
        ranks: between which is exchanged; H is a multiple of their number.

    Returns:
        Each [B, S_all, H/ranks, D]: replicated tokens, then those of every rank.

    """
    if ranks.size == 1:
        return list(states)
    num_heads = [tensor.shape[2] // ranks.size for tensor in states]
    # Each B S ranks H/ranks D.
    divided = [torch.unflatten(tensor[:, num_replicated:], 2, (ranks.size, -1)) for tensor in states]
    received = ranks.all_to_all(torch.cat(divided, dim=3).permute(2, 0, 1, 3, 4))  # ranks B S H/ranks D
    tokens = torch.split(received.transpose(0, 1).flatten(1, 2), num_heads, dim=2)
    own = [slice(ranks.rank * heads, (ranks.rank + 1) * heads) for heads in num_heads]
    return [
        torch.cat((tensor[:, :num_replicated, heads], other), dim=1)
        for tensor, heads, other in zip(states, own, tokens, strict=True)
    ]


def tokens_for_heads(states: Tensor, num_replicated: int, ranks: Communicator) -> Tensor:
    """Exchange heads for tokens: [B, S_all, H/ranks, D] to [B, S, H, D], the inverse of `heads_for_tokens`."""
    if ranks.size == 1:
        return states
    tokens = torch.unflatten(states[:, num_replicated:], 1, (ranks.size, -1)).transpose(0, 1)  # ranks B S H/ranks D
    replicated = states[:, :num_replicated].expand(ranks.size, -1, -1, -1, -1)
    received = ranks.all_to_all(torch.cat((replicated, tokens), dim=2))
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)
