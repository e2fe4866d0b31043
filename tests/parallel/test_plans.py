"""What a model states of how it can be divided."""

from __future__ import annotations

import torch
from torch import nn

from safelight.attention import Attention
from safelight.parallel.plans import SequencePlan, matching, model_facts, sequence_plan, tensor_plan


class Block(nn.Module):
    def __init__(self, num_heads):
        super().__init__()
        self.attention = Attention(num_heads, 4)
        self.linear = nn.Linear(4, 3)


class Bare(nn.Module):
    """Two blocks, whose heads have two as their largest common divisor."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(4), Block(6)])


class Planned(Bare):
    _sp_plan = {"attention": ("blocks.*.attention",), "rotary": "freqs_cis"}  # noqa: RUF012 - as models state it
    _tp_plan = {"blocks.*.linear": "column"}  # noqa: RUF012


class Heir(Planned):
    """A class states its plans itself: it may compute otherwise than the one that it extends."""


def test_plans_are_those_of_the_class_itself():
    assert sequence_plan(Planned()) == SequencePlan(("blocks.*.attention",), "freqs_cis")
    assert tensor_plan(Planned()) == {"blocks.*.linear": "column"}
    for other in (Bare(), Heir()):
        assert sequence_plan(other) is None and tensor_plan(other) is None


def test_a_star_is_the_number_of_a_block():
    assert [name for name, _ in matching(Planned(), "blocks.*.linear")] == ["blocks.0.linear", "blocks.1.linear"]
    assert [name for name, _ in matching(Planned(), "blocks.1.linear")] == ["blocks.1.linear"]
    assert [name for name, _ in matching(Planned(), "blocks.*")] == ["blocks.0", "blocks.1"]


def test_facts_of_a_model_need_no_weights():
    with torch.device("meta"):
        facts = model_facts("m", Planned(), 2, row_parallel_vae=True)
    assert (facts.num_heads, facts.num_branches, facts.parameter_bytes) == (2, 2, 2 * (4 * 3 + 3) * 4)
    assert facts.tensor_plan and facts.sequence_plan and facts.row_parallel_vae
    without = model_facts("m", None, 3, row_parallel_vae=False)
    assert (without.num_heads, without.num_branches) == (1, 3)
    assert not (without.tensor_plan or without.sequence_plan or without.row_parallel_vae)
