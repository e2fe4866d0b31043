"""Layouts: what is refused, and what is chosen for a number of devices."""

from __future__ import annotations

import dataclasses

import pytest

from safelight.errors import InvalidParameterError
from safelight.parallel.layout import ModelFacts, ParallelLayout, choose_layout

MODEL = ModelFacts("a model", 24, 2, tensor_plan=True, sequence_plan=True, row_parallel_vae=True, parameter_bytes=2**34)
BARE = dataclasses.replace(MODEL, tensor_plan=False, sequence_plan=False, row_parallel_vae=False)


@pytest.mark.parametrize(
    ("layout", "facts", "message"),
    [
        ({"cfg": 3}, MODEL, "cfg_parallel_size: got 3; it takes at most 2, the guidance branches of a model"),
        ({"tp": 5}, MODEL, "tp_size: got 5; it takes a divisor of the 24 heads of a model"),
        ({"ulysses": 5}, MODEL, "ulysses_degree: got 5; it takes a divisor of the 24 heads that a rank has"),
        ({"ulysses": 8, "tp": 2}, MODEL, "a divisor of the 12 heads that a rank has, 24 over tp_size 2"),
        ({"tp": 2}, BARE, "tp_size: got 2; it takes 1: a model has no tensor-parallel plan"),
        ({"ulysses": 2}, BARE, "ulysses_degree: got 2; it takes 1: a model has no sequence-parallel plan"),
        ({"ring": 2}, BARE, "ring_degree: got 2; it takes 1: a model has no sequence-parallel plan"),
        ({"cfg": 2, "vae": True}, BARE, "vae_parallel: got True; it takes false: the VAE of a model cannot be divided"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_numbers(layout, facts, message):
    with pytest.raises(InvalidParameterError) as refused:
        ParallelLayout(**layout).check(facts)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("num_devices", "details", "chosen"),
    [
        (1, {}, (1, 1, 1, 1)),
        (2, {}, (2, 1, 1, 1)),
        (4, {}, (2, 1, 2, 1)),
        (8, {}, (2, 1, 4, 1)),
        (3, {}, (1, 1, 3, 1)),
        (6, {}, (2, 1, 3, 1)),
        (5, {}, (1, 5, 1, 1)),
        (10, {}, (2, 5, 1, 1)),
        (8, {"device_bytes": 2**34}, (2, 1, 2, 2)),
        (4, {"device_bytes": 2**33}, (1, 1, 1, 4)),
    ],
)
def test_the_choice_for_a_number_of_devices(num_devices, details, chosen):
    choice = choose_layout(num_devices, MODEL, **details)
    assert choice.layout.sizes == chosen
    assert choice.layout.num_devices == num_devices
    assert len(choice.reasons) == sum(size > 1 for size in chosen)
    assert str(choice).startswith(f"{num_devices} devices: {choice.layout.describe()}.")


def test_without_a_sequence_plan_tensor_parallelism_takes_the_rest():
    facts = dataclasses.replace(MODEL, sequence_plan=False)
    assert choose_layout(8, facts).layout.sizes == (2, 1, 1, 4)


def test_devices_that_cannot_be_used_are_refused():
    with pytest.raises(InvalidParameterError, match=r"devices: got 4; it takes 1 or 2: a model cannot be divided"):
        choose_layout(4, BARE)
    with pytest.raises(InvalidParameterError, match=r"16\.0 GiB of weights, 3\.2 GiB a device"):
        choose_layout(4, MODEL, device_bytes=2**32)


def test_the_order_of_the_choice_stands_for_any_number():
    for num_devices in range(1, 33):
        layout = choose_layout(num_devices, MODEL).layout
        layout.check(MODEL)
        assert layout.num_devices == num_devices
        assert layout.cfg == (2 if num_devices % 2 == 0 else 1)
