"""Model calls: what they are told apart by, and which of them may be made as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from safelight.core.calls import ModelCall
from safelight.core.params import SamplingParams
from safelight.core.request import Req


def call(**changes):
    req = Req("r", SamplingParams(prompt="x"), output_index=2)
    made = ModelCall("transformer", {"x": (torch.ones(3, 5), None)}, {}, (8, 8), req.key("cond", 4))
    return replace(made, **changes)


def test_a_key_names_one_output():
    first, second = (Req("r", SamplingParams(prompt="x"), output_index=index) for index in range(2))
    assert first.key("cond", 1) != second.key("cond", 1)
    assert call().key == ("r/2", "cond", 4)


def test_rows_are_those_of_the_first_tensor():
    assert call().num_rows == 3


def test_what_may_be_made_as_one_has_one_key():
    assert call().stack_key == call(key=call().key._replace(output="other")).stack_key
    others: list[dict[str, Any]] = [{"component": "other"}, {"method": "encode"}, {"model": "m"}]
    others += [{"signature": (8, 16)}, {"static": {"a": 1}}]
    assert len({call().stack_key, *(call(**each).stack_key for each in others)}) == 1 + len(others)
    assert call(signature=None).stack_key is None
