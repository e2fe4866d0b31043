"""How a forward's tokens are divided, as each rank has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from safelight.attention import Attention
from safelight.errors import InvalidParameterError
from safelight.parallel.collectives import Communicator
from safelight.parallel.sequence import apply_sequence_parallel, piece_of


class Model(nn.Module):
    """Attention over its tokens."""

    def __init__(self, **details):
        super().__init__()
        self.attention = Attention(2, 4, **details)


class Planned(Model):
    """And a plan for them."""

    _sp_plan = {"attention": ("attention",), "rotary": "freqs_cis"}  # noqa: RUF012 - a plan as models state it


def two_ranks() -> Any:
    lone, both = Communicator("lone"), Communicator("both")
    both.size = 2
    return SimpleNamespace(sequence=both, ulysses=both, ring=lone)


@pytest.mark.parametrize("length", [1, 3, 8, 11])
@pytest.mark.parametrize("size", [2, 4])
def test_pieces_are_all_there_is_and_zeros(length, size):
    whole = torch.arange(1.0, length + 1)[None, :, None].expand(2, -1, 3)
    pieces = [piece_of(whole, 1, rank, size) for rank in range(size)]
    assert {piece.shape for piece in pieces} == {(2, -(-length // size), 3)}
    joined = torch.cat(pieces, dim=1)
    assert torch.equal(joined[:, :length], whole) and not joined[:, length:].any()


@pytest.mark.parametrize(
    ("model", "takes"),
    [(Model(), "Model has no sequence-parallel plan"), (Planned(causal=True), "the attention of attention is causal")],
)
def test_what_cannot_be_divided_is_refused(model, takes):
    with pytest.raises(InvalidParameterError, match=f"ulysses_degree: got 2; it takes 1: {takes}"):
        apply_sequence_parallel(model, two_ranks())


def test_layers_and_model_are_told_of_other_ranks():
    model = Planned()
    own = model.attention.strategy
    apply_sequence_parallel(model, SimpleNamespace(sequence=Communicator("lone")))  # type: ignore[arg-type]
    assert model.attention.strategy is own, "one rank has all tokens"
    apply_sequence_parallel(model, two_ranks())
    assert model.attention.strategy is not own
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
