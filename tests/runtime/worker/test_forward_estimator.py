"""Whether a forward fits: counted without weights, scaled by what a rank took before."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from safelight import ServerArgs
from safelight.acceleration.activations import count_peak
from safelight.core.calls import CallKey, ModelCall
from safelight.core.executor import Execution
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.forward_estimator import ForwardEstimator
from safelight.runtime.worker.memory_gauge import Gauge
from safelight.testing.models import requests
from tests.calls import through
from tests.recipes import all_recipes

BYTES = 10 * 4
"""That `Tenfold` takes for each element."""


class Tenfold(nn.Module):
    """Makes ten elements of one."""

    def forward(self, hidden_states):
        return torch.cat([hidden_states] * 10, 1)


class FakeGauge(Gauge):
    """Where a forward takes a share of what is counted, and something of its own."""

    def __init__(self, share, own=0):
        self.share, self.own = share, own
        self.left = self.elements = 0

    def free(self):
        return self.left

    def ceiling(self):
        return self.left

    def begin(self):
        return 500

    def peak(self):
        return 500 + self.own + int(self.share * BYTES * self.elements)

    def measured(self, estimator, elements):
        """Let the estimator learn from a forward."""
        self.elements = elements
        return through(estimator.measured, lambda call: call.kwargs["hidden_states"])(call_of(elements))


def call_of(elements, component="transformer"):
    kwargs = {"hidden_states": torch.zeros(1, elements)}
    return ModelCall(component, kwargs, {}, (elements,), CallKey("r", "cond", 0))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_is_learnt_from_what_forwards_took(share):
    gauge = FakeGauge(share)
    estimator = ForwardEstimator(gauge, {"transformer": Tenfold})
    assert estimator.fits(call_of(10**6)), "nothing is known before the first"
    made = gauge.measured(estimator, 50)
    assert made.shape == (1, 50)
    gauge.left = int(share * BYTES * 100)
    assert estimator.fits(call_of(100)) and not estimator.fits(call_of(101))
    assert estimator.fits(call_of(50), num_stacked=2) and not estimator.fits(call_of(51), num_stacked=2)


def test_what_a_small_first_forward_takes_besides_is_not_held_against_a_large_one():
    gauge = FakeGauge(0.5, own=10**6)
    estimator = ForwardEstimator(gauge, {"transformer": Tenfold})
    gauge.measured(estimator, 50)
    gauge.left = BYTES * 1000
    assert estimator.fits(call_of(1000)) and not estimator.fits(call_of(1001)), "at most what is counted"
    gauge.own = 0
    gauge.measured(estimator, 40)
    assert not estimator.fits(call_of(1001)), "a smaller one says less"
    gauge.measured(estimator, 60)
    assert estimator.fits(call_of(2000)) and not estimator.fits(call_of(2001))


def test_of_what_cannot_be_counted_nothing_is_refused():
    gauge = FakeGauge(1.0)
    estimator = ForwardEstimator(gauge, {})
    gauge.measured(estimator, 50)
    assert estimator.fits(call_of(10**6))


@pytest.mark.parametrize("pipeline_name", ["FluxPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "WanPipeline"])
def test_what_is_counted_is_what_the_loaded_model_takes(tmp_path, pipeline_name):
    """On the meta device, one block of each list, and on the host, all of them."""
    recipe = all_recipes()[pipeline_name]
    recipe.build(tmp_path, "default")
    pipeline = load_pipeline(ServerArgs(str(tmp_path), device="cpu", kernels="plain"))
    estimator = ForwardEstimator(FakeGauge(1.0), pipeline.components.empty)
    cases = [case for case in recipe.cases if case.variant == "default" and not case.slow]
    for case in cases[:3]:
        (req, *_) = requests(pipeline, case.fields)
        with Execution(pipeline, req) as execution, torch.inference_mode():
            while not req.in_loop:
                execution.advance()
            for call in req.pending:
                taken = count_peak(functools.partial(pipeline.forward, call))
                assert taken <= estimator.count(call) <= 1.1 * taken, "attention lays its result out as the device does"
