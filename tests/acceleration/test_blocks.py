"""A module's repeated blocks: found by its class's table, and all but one of each list left out for a call."""

from __future__ import annotations

from typing import ClassVar

import pytest
from torch import nn

from safelight.acceleration.blocks import blocks_by_class, one_block_each, repeated_blocks


class Wide(nn.Linear):
    """A block."""


class Narrow(nn.Linear):
    """Another."""


class Model(nn.Module):
    """Two lists of blocks, and one of what is no block."""

    _repeated_blocks: ClassVar[tuple[str, ...]] = ("Wide", "Narrow")

    def __init__(self):
        super().__init__()
        self.wide = nn.ModuleList(Wide(2, 2) for _ in range(3))
        self.narrow = nn.ModuleList(Narrow(2, 2) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))


def test_blocks_are_found_in_their_order_and_by_class():
    model = Model()
    assert repeated_blocks(model) == [*model.wide, *model.narrow]
    assert blocks_by_class(model) == {"Wide": [*model.wide], "Narrow": [*model.narrow]}
    assert repeated_blocks(nn.Sequential(Wide(2, 2))) == [], "a class without a table has none"


def test_one_of_each_list_stays_for_a_call():
    model = Model()
    blocks = repeated_blocks(model)
    with pytest.raises(RuntimeError), one_block_each(model):
        assert repeated_blocks(model) == [model.wide[0], model.narrow[0]] == [blocks[0], blocks[3]]
        assert len(model.heads) == 4
        raise RuntimeError("a call that fails")
    assert repeated_blocks(model) == blocks
