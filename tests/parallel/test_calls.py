"""Which rank makes a call, and how each has its result: seen from one rank, whose partner does the same; and on two."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from safelight.core.calls import CallKey, ModelCall
from safelight.core.model_runner import Forward
from safelight.errors import RankFailedError
from safelight.parallel.calls import CallsOverRanks, Place, divide, filled
from safelight.parallel.collectives import Communicator, DesynchronisedError


class Partner(Communicator):
    """A rank of two; what it would send is kept."""

    def __init__(self, rank=0):
        super().__init__("world")
        self.size, self.rank, self.sent = 2, rank, list[Any]()

    def all_gather_list(self, tensor):
        return [tensor, tensor + 100]

    def broadcast_bytes(self, message, source=0, device="cpu"):
        self.sent.append(message)
        return message or b""

    def broadcast_tensors(self, tensors, device, source=0):
        self.sent.append(tensors)
        return list(tensors or ())


def forward(component, signature=None, rows=1, value=0.0):
    key = CallKey("r/0", "cond", 0)
    return Forward(ModelCall(component, {"x": torch.full((rows, 2), value)}, {}, signature, key), ())


def over(sharing, branches=None, world=None):
    lone = Communicator("lone")
    return CallsOverRanks(sharing, branches or lone, world or lone, torch.device("cpu"))


def make(forwards):
    return [each.call.kwargs["x"] + 1 for each in forwards]


def fail(forwards):
    raise ValueError("no room")


def test_branches_are_divided_and_joined():
    seen: list[float] = []

    def counted(forwards):
        seen.extend(float(each.call.kwargs["x"][0, 0]) for each in forwards)
        return make(forwards)

    made = over({}, Partner())([forward("net", (), value=float(v)) for v in range(3)], counted)
    assert seen == [0, 2], "the second is the partner's; the last is made by both"
    assert [float(each[0, 0]) for each in made] == [1, 101, 3]
    assert divide([5], lambda calls: [torch.tensor(calls[0])], Partner())[0].item() == 5


def test_where_rows_differ_every_rank_makes_all():
    made = over({}, Partner())([forward("net", (), rows=1), forward("net", (), rows=2)], make)
    assert [len(each) for each in made] == [1, 2]


def test_the_first_rank_tells_the_others_what_it_made():
    first = Partner()
    tree = {"a": [torch.ones(2), None], "b": 3}
    (made,) = over({"enc": "first rank"}, world=first)([forward("enc")], lambda _: [tree])
    assert made is tree
    message, tensors = first.sent
    assert filled(msgspec.msgpack.decode(message)["made"], tensors) == {"a": [tensors[0], None], "b": 3}
    assert msgspec.to_builtins(Place(4)) == {"type": "tensor", "number": 4}


@pytest.mark.parametrize(
    ("sharing", "signature", "error"),
    [
        ({"net": "first rank"}, None, RankFailedError),
        ({"net": "together"}, None, DesynchronisedError),
        ({}, (), DesynchronisedError),
        ({}, None, ValueError),
    ],
    ids=["the first rank's", "together", "a step", "each by itself"],
)
def test_a_failure_ends_what_it_must(sharing, signature, error):
    """Where others wait, the group; where the first rank alone failed, its request on all; elsewhere it is its own."""
    world: Any = Partner()
    with pytest.raises(error):
        over(sharing, world=world)([forward("net", signature)], fail)


@pytest.mark.parametrize(
    ("num_calls", "made", "collectives"),
    [(1, [[0], [0]], 0), (2, [[0], [1]], 1), (3, [[0, 2], [1, 2]], 1), (4, [[0, 2], [1, 3]], 2)],
)
def test_branches_run_on_different_ranks(pools, num_calls, made, collectives):
    answers = pools(2).run("branches", num_calls=num_calls, size_of_result=3)
    assert [answer["made"] for answer in answers] == made
    assert all(answer["right"] and answer["collectives"] == collectives for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("num_calls", [1, 2, 3, 4, 6])
def test_branches_run_on_four_ranks(pools, num_calls):
    answers = pools(4).run("branches", num_calls=num_calls, size_of_result=5)
    assert all(answer["right"] for answer in answers)
    assert {call for answer in answers for call in answer["made"]} == set(range(num_calls))
    assert max(len(answer["made"]) for answer in answers) == -(-num_calls // 4)


@pytest.mark.parametrize(
    ("recipe", "case"),
    [("FluxPipeline", "dev, true CFG"), ("WanPipeline", "2.1"), ("QwenImageEditPipeline", "own height")],
)
def test_encoders_on_one_rank_give_all_ranks_their_embeddings(pools, folders, recipe, case):
    assert pools(2).run("embeddings", folder=str(folders(recipe)), recipe=recipe, case=case) == [True, True]


def test_an_encoder_that_fails_ends_the_request_on_every_rank_and_that_alone(pools):
    assert pools(2).run("encoder_that_fails") == [
        ["RankFailedError: this rank's component failed", "[[1.0, 1.0]]", "None", "3"],
        ["RankFailedError: the first rank failed: MemoryError('no room')", "[[1.0, 1.0]]", "None", "3"],
    ]
