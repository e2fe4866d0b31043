"""What every stage is: one piece of work, or a loop; of the request alone."""

from __future__ import annotations

import pytest

from safelight.core.params import SamplingParams
from safelight.core.request import Req
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage


def req(name="r"):
    return Req(request_id=name, params=SamplingParams(prompt="x"))


def test_one_piece_of_work_yields_nothing():
    class Work(PipelineStage):
        def forward(self, batch, server_args):
            batch.step_index += 1
            return batch

    request = req()
    assert list(Work().run(request, ServerArgs())) == [] and request.step_index == 1


def test_a_stage_that_returns_another_request_is_our_mistake():
    class Wrong(PipelineStage):
        def forward(self, batch, server_args):
            return req("other")

    with pytest.raises(AssertionError, match="another request"):
        list(Wrong().run(req(), ServerArgs()))


def test_a_stage_without_work_says_so():
    with pytest.raises(NotImplementedError):
        list(PipelineStage().run(req(), ServerArgs()))


def test_unless_it_says_otherwise_a_stage_has_no_parts_and_keeps_nothing():
    stage = PipelineStage()
    assert not stage.parts()
    assert stage.cache.max_bytes == 0
