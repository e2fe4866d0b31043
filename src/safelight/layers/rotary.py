"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) over several axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.layers.fusable import FusableLayer

PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""The dtype of the real and the imaginary part of rotations."""


def rotary_table(
    ids: Tensor, axes_dims: Sequence[int], theta: float = 10_000.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the rotations of each token, complex64 [S, D/2].

    Args:
        ids: [S, num_axes], the position of each token along each axis.
        axes_dims: channels of a head that turn with each axis; their sum is the head size D.
        theta: base of the frequencies.
        dtype: that the angles are computed in, which is the reference's; sines and cosines are rounded to float32.

    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        angles.append(torch.outer(ids[:, axis].to(dtype), 1.0 / theta**exponents))
    joined = torch.cat(angles, dim=-1)
    return torch.complex(joined.cos().float(), joined.sin().float())


def apply_rotary_emb(hidden_states: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels by their token's angles.

    One complex product does it; on the CPU that is many times faster than the same over separate halves.

    Args:
        hidden_states: [B, S, H, D].
        freqs_cis: complex64 [S, D/2]; it is computed in the dtype of its parts.

    """
    states = hidden_states.to(PARTS[freqs_cis.dtype])
    pairs = torch.view_as_complex(states.reshape(*hidden_states.shape[:-1], -1, 2))  # B S H D/2
    turned = torch.view_as_real(pairs * freqs_cis[:, None, :])
    return turned.flatten(-2).to(hidden_states.dtype)


def norm_heads(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of [B, S, H, D], of each head if `weight` is [D], of all together if it is [H * D]."""
    rows = hidden_states if len(weight) == hidden_states.shape[-1] else hidden_states.flatten(2)
    return F.rms_norm(rows, weight.shape, weight, eps).view(hidden_states.shape)


def qk_norm_rotary(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, freqs_cis: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return query and key, normed and then turned.

    Args:
        query, key: [B, S, H, D].
        query_weight, key_weight: of the RMS norms, [D] or [H * D], as in `norm_heads`.
        freqs_cis: complex64 [S, D/2].
        eps: of the norms.

    """
    return (
        apply_rotary_emb(norm_heads(query, query_weight, eps), freqs_cis),
        apply_rotary_emb(norm_heads(key, key_weight, eps), freqs_cis),
    )


def joint_qk_norm_rotary(
    text_query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_query_weight: Tensor,
    text_key_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    freqs_cis: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of text and then image, [B, S_text + S, H, D]; the first two normed and turned.

    Args:
        text_query, text_key, text_value: [B, S_text, H, D].
        query, key, value: [B, S, H, D], the image's.
        text_query_weight, text_key_weight, query_weight, key_weight: of the RMS norms, [D] or [H * D].
        freqs_cis: complex64 [S_text + S, D/2].
        eps: of the norms.

    """
    joint_query = torch.cat((norm_heads(text_query, text_query_weight, eps), norm_heads(query, query_weight, eps)), 1)
    joint_key = torch.cat((norm_heads(text_key, text_key_weight, eps), norm_heads(key, key_weight, eps)), 1)
    joint_value = torch.cat((text_value, value), 1)
    return apply_rotary_emb(joint_query, freqs_cis), apply_rotary_emb(joint_key, freqs_cis), joint_value


class QKNormRotary(FusableLayer):
    """What comes between a projection and attention: query and key are normed, and turned by their positions.

    The norms' weights belong to the caller, where checkpoints have them.

    Args:
        num_heads, head_dim: of query and key.
        across_heads: whether all heads of a token are normed together.
        eps: of the norms.

    """

    def __init__(self, num_heads: int, head_dim: int, across_heads: bool = False, eps: float = 1e-6) -> None:
        super().__init__(qk_norm_rotary, (num_heads, head_dim, int(across_heads)))
        self.eps = eps

    def forward(
        self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, freqs_cis: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return query and key, [B, S, H, D]; arguments as in `qk_norm_rotary`."""
        query, key = self.operation(query, key, query_weight, key_weight, freqs_cis, self.eps)
        return query, key


class JointQKNormRotary(FusableLayer):
    """The same where text and image attend together: each has norms of its own, and one sequence is made of both.

    Args:
        num_heads, head_dim: of query, key and value.
        eps: of the norms.

    """

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__(joint_qk_norm_rotary, (num_heads, head_dim))
        self.eps = eps

    def forward(
        self, text: Sequence[Tensor], image: Sequence[Tensor], weights: Sequence[Tensor], freqs_cis: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, [B, S_text + S, H, D].

        Args:
            text: query, key and value, each [B, S_text, H, D].
            image: the same, each [B, S, H, D].
            weights: of the norms of the text's query and key, then of the image's, each [D].
            freqs_cis: complex64 [S_text + S, D/2].

        """
        query, key, value = self.operation(*text, *image, *weights, freqs_cis, self.eps)
        return query, key, value
