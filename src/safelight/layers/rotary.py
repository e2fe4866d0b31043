"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) over several axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        freqs_cis: complex64 [S, D/2].

    """
    pairs = torch.view_as_complex(hidden_states.float().reshape(*hidden_states.shape[:-1], -1, 2))  # B S H D/2
    turned = torch.view_as_real(pairs * freqs_cis[:, None, :])
    return turned.flatten(-2).to(hidden_states.dtype)
