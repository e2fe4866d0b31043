"""Trees of a package's calls: taken apart, where they lie, what draws random numbers, and float32 to compare with."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from safelight.backends.trees import InFloat32, RandomStates, aligned, put_together, static, taken_apart


def test_outputs_of_both_libraries_are_trees():
    tensor = torch.ones(2)
    tree = {"a": [UNet2DConditionOutput(sample=tensor), 1], "b": BaseModelOutput(last_hidden_state=tensor)}
    leaves, form = taken_apart(tree)
    assert leaves[0] is tensor is leaves[2] and leaves[1] == 1
    again = put_together([tensor + 1, 2, tensor + 2], form)
    assert type(again["a"][0]) is UNet2DConditionOutput and torch.equal(again["a"][0].sample, tensor + 1)
    assert again["b"].last_hidden_state.tolist() == [3, 3] and again["a"][1] == 2
    assert hash(form) == hash(taken_apart(again)[1]) and form == taken_apart(again)[1]


def test_static_values_are_told_by_type_and_text():
    assert len({static(value) for value in (1, 1.0, True, "1", None, torch.float16, 0.0, -0.0)}) == 8
    assert static(float("nan")) == static(float("nan")) and static(object()) is None and static(np.ones(1)) is None


def test_what_lies_anywhere_is_copied():
    memory = np.zeros(64, np.float32)
    start = next(at for at in range(16) if memory[at:].ctypes.data % 64 == 4)
    tensor = torch.from_numpy(memory[start : start + 8])
    own = torch.ones(9)[1:]
    tree = aligned({"given": [tensor], "own": own, "n": 1})
    assert tree["given"][0].data_ptr() % 64 == 0 and torch.equal(tree["given"][0], tensor)
    assert tree["own"] is own and tree["n"] == 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda _: torch.rand(1),
        lambda given: torch.rand(1, generator=given),
        lambda _: np.random.rand(1),
        lambda _: np.random.randn(1),
        lambda _: random.random(),
    ],
)
def test_whatever_draws_is_noticed(draw):
    given = torch.Generator().manual_seed(1)
    states = RandomStates([given])
    assert not states.have_moved()
    torch.rand(1, generator=torch.Generator())
    assert not states.have_moved(), "a generator of its own is nobody's business"
    draw(given)
    assert states.have_moved()


def test_a_network_of_lower_precision_computes_in_float32_as_its_weights_say():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(torch.bfloat16)
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    buffer = torch.zeros(3, 8, dtype=torch.bfloat16)
    with torch.inference_mode(), InFloat32():
        made = network(hidden)
        buffer.copy_(hidden)
    assert made.dtype == torch.float32 and torch.equal(made, network.float()(hidden.float()))
    assert buffer.dtype == torch.bfloat16 and torch.equal(buffer, hidden)
