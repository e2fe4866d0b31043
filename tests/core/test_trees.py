"""Trees of tensors: what is rebuilt, what is changed in place, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from safelight.core.trees import leaves, map_tree, with_leaves


@dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    name: str = "x"


@dataclass
class State:
    kept: list[torch.Tensor] = field(default_factory=list)
    number: int = 3


def test_containers_and_frozen_dataclasses_are_rebuilt():
    ones = torch.ones(2)
    tree: dict[str, Any] = {"list": [ones, None, 3], "pair": (ones, "text"), "frozen": Frozen(ones)}
    made = map_tree(tree, lambda tensor: tensor * 2)
    assert made["list"][0].tolist() == [2, 2] and made["list"][1:] == [None, 3]
    assert made["pair"][1] == "text" and isinstance(made["pair"], tuple)
    assert made["frozen"].tensor.tolist() == [2, 2] and made["frozen"].name == "x"
    assert tree["frozen"].tensor is ones, "the old tree is as it was"


def test_a_state_stays_the_same_object():
    """Whoever holds it sees what became of it."""
    state = State([torch.ones(1)])
    assert map_tree(state, torch.zeros_like) is state
    assert state.kept[0].item() == 0 and state.number == 3


def test_leaves_come_in_one_order_and_go_back_in_it():
    tree = {"a": [torch.tensor(1.0), {"b": torch.tensor(2.0)}], "c": (None, Frozen(torch.tensor(3.0)))}
    assert [leaf.item() for leaf in leaves(tree)] == [1, 2, 3]
    again = with_leaves(tree, [4, 5, 6])
    assert again == {"a": [4, {"b": 5}], "c": (None, Frozen(6))}  # type: ignore[arg-type]
