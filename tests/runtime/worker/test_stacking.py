"""Calls of several requests as one forward: which are joined, and that each has its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safelight.core.calls import CallKey, ModelCall
from safelight.core.form import Form
from safelight.core.model_runner import Forward
from safelight.runtime.worker.stacking import Stacking


def forward(rows, value, branch="cond", signature=(8,), form="eager"):
    kwargs = {"x": (torch.full((rows, 2), float(value)), torch.full((rows,), float(value)))}
    call = ModelCall("transformer", kwargs, {"table": torch.ones(2)}, signature, CallKey(f"r{value}/0", branch, 0))
    return Forward(call, (f"req {value}",), Form(form))  # type: ignore[arg-type]


def made(stacking, forwards):
    seen = []

    def make(given):
        seen.extend(given)
        return [{"sum": sum(each.call.kwargs["x"][0].T), "own": [each.call.kwargs["x"][1]]} for each in given]

    return stacking(forwards, make), seen


def test_rows_of_one_key_are_one_forward_and_each_has_its_own():
    results, seen = made(Stacking(), [forward(2, 1), forward(1, 5), forward(1, 7, signature=(16,)), forward(3, 9)])
    assert [(each.call.num_rows, each.reqs) for each in seen] == [(6, ("req 1", "req 5", "req 9")), (1, ("req 7",))]
    assert [result["sum"].tolist() for result in results] == [[2, 2], [10], [14], [18, 18, 18]]
    assert [result["own"][0].tolist() for result in results] == [[1, 1], [5], [7], [9, 9, 9]]
    assert results[0]["sum"].untyped_storage().nbytes() == 8, "no request keeps another's rows alive"


@pytest.mark.parametrize("differs", [{"form": "compiled"}, {"signature": None}])
def test_what_differs_runs_apart(differs):
    _, seen = made(Stacking(), [forward(1, 1, **differs), forward(1, 2), forward(1, 3, **differs)])
    assert len(seen) == (3 if "signature" in differs else 2)


def test_branches_stay_apart_where_ranks_share_them():
    calls = [forward(1, 1), forward(1, 1, "uncond"), forward(1, 2), forward(1, 2, "uncond")]
    assert [each.call.num_rows for each in made(Stacking(), calls)[1]] == [4]
    assert [each.call.num_rows for each in made(Stacking(apart=True), calls)[1]] == [2, 2]
    assert replace(calls[0]).call is calls[0].call
