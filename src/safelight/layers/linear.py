"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn


class GELUProjection(nn.Module):
    """A linear layer, then GELU in its tanh approximation."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., dim]."""
        activated: Tensor = self.act(self.proj(hidden_states))
        return activated


class FeedForward(nn.Module):
    """The MLP of a transformer block, [..., dim] to [..., dim], four times as wide inside.

    The middle entry of `net` is where training has its dropout; the checkpoint's names count it.
    """

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, expansion * dim), nn.Identity(), nn.Linear(expansion * dim, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., dim]."""
        projected: Tensor = self.net(hidden_states)
        return projected
