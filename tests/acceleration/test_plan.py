"""The plan: what it chooses, what it refuses, and its peak against the bytes that are counted as the model runs."""

from __future__ import annotations

import pytest

from safelight.acceleration.memory import BUFFER_BYTES, NUM_BUFFERS
from safelight.acceleration.plan import (
    WORKSPACE,
    ComponentFootprint,
    Footprint,
    StageFootprint,
    Streamed,
    make_plan,
    plan_mode,
)
from safelight.errors import InvalidParameterError

GIB = 2**30


def stage(name, component, activations):
    return StageFootprint(name, component, activations * GIB)


TWO_TRANSFORMERS = Footprint(
    components={
        "text_encoder": ComponentFootprint(10 * GIB),
        "transformer": ComponentFootprint(20 * GIB, (), (GIB,) * 18, is_alternate=True),
        "transformer_2": ComponentFootprint(20 * GIB, (), (GIB,) * 18, is_alternate=True),
        "vae": ComponentFootprint(1 * GIB),
    },
    stages=[
        stage("text_encoding", "text_encoder", 1),
        stage("denoising", "transformer", 3),
        stage("denoising", "transformer_2", 3),
        stage("decoding", "vae", 12),
    ],
    tiled=[
        stage("text_encoding", "text_encoder", 1),
        stage("denoising", "transformer", 3),
        stage("denoising", "transformer_2", 3),
        stage("decoding", "vae", 5),
    ],
    num_branches=2,
    request="1024x1024",
)


@pytest.mark.parametrize(
    ("limit", "mode", "tiled", "peak"),
    [
        (64, "none", False, 63),
        (63, "none", True, 56),
        (50, "alternates", False, 43),
        (40, "alternates", True, 36),
        # The second transformer stays while the VAE decodes, where there is room.
        (34, "components", False, 33),
        (25, "components", False, 23),
        (20, "blocks", False, 19),
        (13, "blocks", True, 12),
    ],
)
def test_the_cheapest_that_fits_is_chosen(limit, mode, tiled, peak):
    plan = make_plan(TWO_TRANSFORMERS, limit * GIB)
    assert (plan.offload, plan.tiled) == (mode, tiled)
    assert plan.peak == peak * GIB and plan.fits
    assert make_plan(TWO_TRANSFORMERS, limit * GIB, mode).peak == plan.peak
    assert all(planned.peak <= limit * GIB - WORKSPACE for planned in plan.stages)


def test_what_fits_in_no_way_is_refused_with_the_numbers():
    with pytest.raises(InvalidParameterError) as caught:
        make_plan(TWO_TRANSFORMERS, 11 * GIB)
    assert caught.value.param == "memory_limit"
    assert "got '11.00 GiB'; it takes 12.00 GiB or more for 1024x1024 with offload=blocks and tiles" in str(
        caught.value
    )
    assert "text_encoding needs 10.00 GiB of weights (text_encoder) and 1.00 GiB of activations" in str(caught.value)


def test_a_mode_that_the_model_does_not_have_is_refused():
    one = Footprint({"transformer": ComponentFootprint(GIB)}, [stage("denoising", "transformer", 1)], 1, "64x64")
    for mode, why in (("alternates", "one transformer"), ("blocks", "no repeated blocks")):
        with pytest.raises(InvalidParameterError, match=why):
            make_plan(one, 100 * GIB, mode)


@pytest.mark.parametrize("room", [0, 5, 9, 12, 17, 100])
def test_as_many_blocks_stay_as_fit(room):
    """Against trying each number: the next one would not fit."""
    component = ComponentFootprint(43, (), (3, 3, 3, 5, 5, 5, 5, 5, 5))
    footprint = Footprint({"transformer": component}, [StageFootprint("denoising", "transformer", 2)], 3, "64x64")
    plan = plan_mode(footprint, WORKSPACE + room + 2, "blocks", False)
    count = plan.resident_blocks["transformer"]
    assert Streamed.of(component, count).num_bytes <= max(room, Streamed.of(component, 0).num_bytes)
    assert count == 6 or Streamed.of(component, count + 1).num_bytes > room
    assert plan.bytes_a_step == 3 * Streamed.of(component, count).bytes_a_call
    assert plan.pinned == 2 * Streamed.of(component, count).slot_bytes + NUM_BUFFERS * BUFFER_BYTES
