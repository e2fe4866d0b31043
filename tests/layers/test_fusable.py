"""Layers whose function can be exchanged."""

from __future__ import annotations

from torch import nn

from safelight.layers.fusable import FusableLayer
from safelight.layers.modulation import ModulatedNorm


def test_a_layer_computes_plainly_until_another_function_is_put_there():
    layer = FusableLayer(max, (4, 2))
    assert layer.operation is layer.plain is max and layer.sizes == (4, 2)
    layer.operation = min
    assert layer.operation(1, 2) == 1 and layer.plain(1, 2) == 2


def test_the_function_is_no_part_of_a_checkpoint():
    norm = ModulatedNorm(8)
    parts = [module for module in norm.modules() if isinstance(module, FusableLayer)]
    assert parts and all(isinstance(part, nn.Module) for part in parts)
    assert sorted(norm.state_dict()) == ["linear.bias", "linear.weight"]
