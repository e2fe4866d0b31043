"""What the tests of layers compare with: a reference's weights in ours, and how close is close."""

from __future__ import annotations

import torch
from torch import nn

from safelight.testing.recipes import shake


def with_weights_of(reference: nn.Module, ours: nn.Module) -> nn.Module:
    ours.load_state_dict(shake(reference, 0).state_dict(), strict=True)
    return ours


def close(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=0)
