"""Bytes alive at one time, against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.acceleration.activations import count_peak

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])
KIB = 1024


def floats(device, kib=4):
    return torch.ones(kib * KIB // 4, device=device)


@DEVICES
def test_a_temporary_counts_while_it_lives(device):
    def chain():
        tensor = floats(device)
        for _ in range(5):
            tensor = tensor * 2  # the old one and the new one
        return tensor

    assert count_peak(chain) == 8 * KIB


@DEVICES
def test_what_is_held_adds_up_and_what_is_freed_does_not(device):
    def work():
        held = [floats(device) for _ in range(3)]
        held.pop()
        held.append(floats(device, 8))
        del held[:]
        floats(device, 8)

    assert count_peak(work) == 16 * KIB


@DEVICES
def test_views_and_operations_in_place_count_once(device):
    def work():
        tensor = floats(device)
        views = [tensor[:5], tensor.view(2, -1), tensor.reshape(4, -1).T, tensor.expand(3, -1), tensor.detach()]
        tensor.add_(1)
        torch.mul(tensor, 2, out=tensor)
        return views

    assert count_peak(work) == 4 * KIB


@DEVICES
def test_what_lies_outside_does_not_count(device):
    outside, layer = floats(device), nn.Linear(16, 16, device=device)

    def work():
        outside.add_(1)
        outside.view(2, -1)[0].mul_(2)
        return layer(outside[:16])

    assert count_peak(work) == 16 * 4


@DEVICES
def test_a_view_keeps_its_whole_storage(device):
    def work():
        rows = [floats(device)[:1] for _ in range(3)]
        return rows, floats(device)

    assert count_peak(work) == 16 * KIB


@DEVICES
def test_an_operation_counts_in_its_parts(device):
    """A product of broadcast stacks copies both factors: three times sixteen matrices."""
    left, right = torch.ones(4, 1, 8, 8, device=device), torch.ones(1, 4, 8, 8, device=device)
    assert count_peak(lambda: left @ right) == 3 * 16 * 64 * 4


@DEVICES
def test_attention_is_one_kernel(device):
    query = torch.ones(1, 2, 64, 16, device=device)
    assert count_peak(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * 64 * 16 * 4


def test_other_allocations_at_the_same_address_are_told_apart():
    """Memory that is freed is taken again at once on the CPU: forty tensors one after another are one at a time."""
    outside = [floats("cpu") for _ in range(5)]

    def work():
        for index in range(40):
            _ = floats("cpu").add_(outside[index % 5])
            del _

    assert count_peak(work) <= 8 * KIB


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_meta_and_cpu_agree_on_a_model_of_the_libraries(size):
    from diffusers import AutoencoderKL

    def peak(device):
        torch.manual_seed(0)
        with torch.device(device):
            blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
            vae = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4).eval()
            latents = torch.zeros(1, 4, size[0] // 2, size[1] // 2)
        return count_peak(lambda: vae.decode(latents, return_dict=False))

    assert peak("meta") == peak("cpu") > 3 * 16 * size[0] * size[1] * 4
