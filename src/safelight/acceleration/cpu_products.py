"""Linear layers on the CPU by the faster of torch's libraries, with no setting of the process touched.

torch gives float32 products to MKL, or to oneDNN where a setting of the whole process asks for it. Here oneDNN is
called by its operator instead: nothing has to be set, restored, or kept from other threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.layers.linear import GELUProjection

MAX_ERROR = (torch.finfo(torch.float32).eps * torch.finfo(torch.bfloat16).eps) ** 0.5
"""The largest relative error against float64 of what counts as float32: 3e-5, midway between the roundings of the two.

Sums of 3,072 products are off by 2e-7 to 1.2e-6, as they are added up; in bfloat16 or TF32 by 2e-4 to 2e-3.
"""

CHECKED_SIZES = ((3, 64, 32), (64, 768, 96), (257, 131, 515), (96, 3072, 768))
"""Rows, input channels and output channels at which an operator is checked."""

MIN_WIDENED_ROWS = 16
"""Of fewer rows, the cast of the weights would take longer than bfloat16's own product."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`x @ weight.T + bias`: of [..., C], [C_out, C] and [C_out]."""


def onednn_linear(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", approximate: str = ""
) -> Tensor:
    """Return `hidden_states @ weight.T + bias`, float32, by oneDNN.

    Args:
        hidden_states: [..., C].
        weight: [C_out, C].
        bias: [C_out].
        activation: `gelu` is made of each part of the product as it is finished: next to free.
        approximate: of GELU, `tanh` or `none`.

    """
    # Our own operator costs microseconds, but Inductor lowers torch's for frozen weights alone.
    product = _opaque_linear if torch.compiler.is_compiling() else _eager_linear
    return product(hidden_states, weight, bias, activation, approximate)


def _eager_linear(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str, approximate: str
) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, activation, [], approximate)
    return product


_opaque_linear = torch.library.custom_op("safelight::onednn_linear", _eager_linear, mutates_args=())


@_opaque_linear.register_fake
def _(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str, approximate: str) -> Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], weight.shape[0]))


def is_float32(product: Product) -> bool:
    """Return whether a product is float32 and nothing less, on sizes and numbers that are always the same.

    A processor with matrix units may round to bfloat16 on the way. In which order sums are made is nothing to refuse.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, channels, out_channels in CHECKED_SIZES:
        hidden_states = torch.randn(rows, channels, generator=generator)
        weight = torch.randn(out_channels, channels, generator=generator) * channels**-0.5
        bias = torch.randn(out_channels, generator=generator)
        exact = F.linear(hidden_states.double(), weight.double(), bias.double())
        error = float((product(hidden_states, weight, bias).double() - exact).norm() / exact.norm())
        if not error <= MAX_ERROR:
            return False
    return True


class OneDNNLinear(nn.Linear):
    """A float32 linear layer by oneDNN."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., C_out]."""
        return onednn_linear(hidden_states, self.weight, self.bias)


class WidenedLinear(nn.Linear):
    """A bfloat16 linear layer computed in float32 and rounded once, never less exact than bfloat16's own product.

    The weights are cast at each call: no more memory is taken than one layer's, for as long as it runs.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., C_out], bfloat16."""
        if hidden_states.shape[:-1].numel() < MIN_WIDENED_ROWS:
            return super().forward(hidden_states)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias).to(hidden_states.dtype)


class FusedGELUProjection(GELUProjection):
    """A linear layer and its GELU as one operator of oneDNN, in float32; bfloat16 is cast and rounded once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [..., C_out]."""
        bias = None if self.proj.bias is None else self.proj.bias.float()
        weight, approximate = self.proj.weight.float(), self.act.approximate
        return onednn_linear(hidden_states.float(), weight, bias, "gelu", approximate).to(hidden_states.dtype)
