"""Convolutions in bands against those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.layers import convolution
from safelight.layers.convolution import add_conv, conv_in_place


class CountedOperations(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self):
        super().__init__()
        self.num_convolutions = self.num_others = 0
        self.others = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.num_convolutions += 1
        elif not func.is_view:
            self.num_others += 1
            self.others.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("height", [1, 7, 64, 65, 200])
def test_bands_of_a_convolution_are_the_whole(height, monkeypatch):
    generator = torch.Generator().manual_seed(height)
    frame = torch.randn(1, 6, height, 9, generator=generator)
    weight = torch.randn(6, 6, 3, 3, generator=generator)
    for rows in (2, 64):
        monkeypatch.setattr(convolution, "BAND_ROWS", rows)
        expected = nn.functional.conv2d(frame, weight, padding=1)
        torch.testing.assert_close(conv_in_place(frame.clone(), weight), expected, atol=1e-5, rtol=1e-5)
        added = torch.ones_like(frame)
        add_conv(added, frame, weight)
        torch.testing.assert_close(added, expected + 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("height", [60, 480, 720])
def test_on_another_device_than_a_cpu_a_convolution_is_one(height):
    """Launches cost more than memory there."""
    frame, weight = torch.empty(1, 96, height, 832, device="meta"), torch.empty(96, 96, 3, 3, device="meta")
    with CountedOperations() as counted:
        add_conv(torch.empty_like(frame), frame, weight)
        conv_in_place(frame, weight)
    assert counted.num_convolutions == 2 and counted.num_others <= 2, counted.others
