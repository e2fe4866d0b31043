"""What several ranks do to one model: which layout, and who runs which component."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.parallel.apply import choose, over_ranks, share, waits_on_host
from safelight.parallel.collectives import Communicator
from safelight.parallel.layout import ModelFacts, ParallelLayout
from safelight.parallel.mesh import lone_mesh

CPU = torch.device("cpu")
FACTS = ModelFacts("a model", 24, 2, tensor_plan=True, sequence_plan=True, row_parallel_vae=True)


def two_ranks(rank, **layout) -> Any:
    """Return a mesh of two ranks as one of them sees it."""
    world, lone = Communicator("world"), Communicator("lone")
    world.size, world.rank = 2, rank
    return SimpleNamespace(layout=ParallelLayout(**layout), world=world, cfg=world, tp=lone, sequence=lone)


def test_sizes_that_are_given_are_taken_and_a_number_alone_is_left_to_the_planner():
    given = choose(ServerArgs(ring_degree=2, tp_size=3, vae_parallel=True), FACTS)
    assert given.layout == ParallelLayout(ring=2, tp=3, vae=True) and given.reasons == ()
    assert choose(ServerArgs(), FACTS).layout == ParallelLayout()
    assert choose(ServerArgs(devices=4), FACTS).layout == ParallelLayout(cfg=2, ulysses=2, vae=True)
    with pytest.raises(InvalidParameterError, match="tp_size: got 5"):
        choose(ServerArgs(tp_size=5), FACTS)


@pytest.mark.parametrize(("vae", "shared"), [(False, {}), (True, {"vae": "together"})])
def test_components_are_shared_by_what_they_are(vae, shared):
    modules = {"text_encoder": nn.Linear(2, 2), "vae": nn.Linear(2, 2), "tokenizer": object()}
    assert share(modules, lone_mesh(), CPU) == {}
    assert share(modules, two_ranks(0, cfg=2, vae=vae), CPU) == {"text_encoder": "first rank", **shared}


def test_an_encoder_waits_on_the_host_of_those_that_may_not_need_it():
    assert waits_on_host("text_encoder_2", two_ranks(1, cfg=2))
    assert not waits_on_host("text_encoder_2", two_ranks(0, cfg=2)) and not waits_on_host("vae", two_ranks(1, cfg=2))


def test_one_rank_makes_its_calls_by_itself():
    assert over_ranks({}, lone_mesh(), CPU) is None
    made = over_ranks({"vae": "together"}, two_ranks(1, cfg=2), CPU)
    assert made is not None and made.sharing == {"vae": "together"}
