"""The mesh: which ranks share what."""

from __future__ import annotations

import pytest

from safelight.parallel.layout import AXES
from safelight.parallel.mesh import lone_mesh


@pytest.mark.slow
def test_the_mesh_is_torch_s_and_neighbours_are_of_the_last_axis(pools):
    answers = pools(4).run("mesh_of", layout={"cfg": 2, "tp": 2})
    assert [answer["place"] for answer in answers] == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]]
    assert all(answer["torch"] == answer["own"] and answer["at"] == answer["place"] for answer in answers)
    assert answers[3]["own"] == {"cfg": [1, 3], "ring": [3], "ulysses": [3], "tp": [2, 3]}
    answers = pools(4).run("mesh_of", layout={"ring": 2, "ulysses": 2})
    assert all(answer["sequence"] == [0, 1, 2, 3] and answer["torch"] == answer["own"] for answer in answers)


def test_a_mesh_of_more_ranks_than_there_are_is_refused(pools):
    told, _ = pools(2).run("too_few", layout={"cfg": 2, "tp": 2})
    assert told == "devices: got 2; it takes 4, the product of 2 x 1 x 1 x 2 (cfg x ring x ulysses x tp)"


def test_one_device_is_alone_on_every_axis():
    mesh = lone_mesh()
    assert mesh.traffic().keys() == {*AXES, "sequence", "world", "control"}
    assert {each.size for each in (mesh.cfg, mesh.tp, mesh.sequence, mesh.world)} == {1}
