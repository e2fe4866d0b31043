"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn


class GELUProjection(nn.Module):
    """A linear layer, then GELU: in its tanh approximation, or exact (`none`)."""

    def __init__(self, in_dim: int, dim: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.act = nn.GELU(approximate=approximate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., dim]."""
        activated: Tensor = self.act(self.proj(hidden_states))
        return activated


class FeedForward(nn.Module):
    """The MLP of a transformer block, [..., dim] to [..., out_dim].

    The middle entry of `net` is where training has its dropout; the checkpoint's names count it.

    Args:
        dim: channels.
        inner_dim: channels inside; four times `dim` if None.
        out_dim: channels of the result; `dim` if None.
        approximate: of GELU, `tanh` or `none`.

    """

    def __init__(
        self, dim: int, inner_dim: int | None = None, out_dim: int | None = None, approximate: str = "tanh"
    ) -> None:
        super().__init__()
        inner = inner_dim or 4 * dim
        self.net = nn.Sequential(
            GELUProjection(dim, inner, approximate), nn.Identity(), nn.Linear(inner, out_dim or dim)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., out_dim]."""
        projected: Tensor = self.net(hidden_states)
        return projected
