"""Calls of the package's networks as one: only what a trial has proven, and bytes as alone where it has not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safelight import ServerArgs
from safelight.backends.diffusers import DiffusersStage
from safelight.backends.stacking import ProvenStacking, Records, TreeSignature, possible_roles
from safelight.backends.trees import InFloat32
from safelight.core.calls import CallKey, ModelCall
from safelight.core.model_runner import Forward
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import requests
from tests.backends.conftest import FIELDS

CPU = torch.device("cpu")


def driven(pipeline, asked, batching, apart=0):
    """Return each request's outputs, and how many rows every call of the loop had; they begin `apart` ticks apart."""
    engine = Engine(pipeline, batching=batching)
    inner, rows = pipeline.forward, []

    def forward(call):
        if call.component in ("transformer", "unet") and "trial" not in call.static:
            rows.append(next(value for value in call.kwargs.values() if isinstance(value, torch.Tensor)).shape[0])
        return inner(call)

    pipeline.forward = forward
    tasks = []
    try:
        for fields in asked:
            tasks.append(engine.add(requests(pipeline, fields)[0]))
            for _ in range(apart):
                engine.tick()
        while engine.tasks:
            engine.tick()
    finally:
        del pipeline.forward
    assert [task.error for task in tasks] == [None] * len(asked)
    return [task.execution.req.outputs[0] for task in tasks], rows


def records_of(pipeline):
    stage = pipeline.stages["pipeline"]
    assert isinstance(stage, DiffusersStage)
    return list(stage.records._kept.values())


PROMPTS = ("a cat", "two dogs at dawn", "the sea", "a cat")


def asked_of(name):
    without = {"DiTPipeline": {"class_labels"}}.get(name, set())
    fields = {key: value for key, value in FIELDS[name].items() if key not in without}
    own = ({"class_labels": [number]} if without else {"prompt": PROMPTS[number]} for number in range(4))
    return [{**fields, **each, "seed": number, "output_type": "np"} for number, each in enumerate(own)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "WanVACEPipeline"]
    + [
        pytest.param(name, marks=pytest.mark.slow) for name in ("LTXPipeline", "StableDiffusionPipeline", "DiTPipeline")
    ],
)
def test_requests_of_real_classes_are_stacked_once_it_is_proven(checkpoint, name, dtype):
    """They begin at different times, so that the numbers of their steps differ too."""
    pipeline = load_pipeline(ServerArgs(str(checkpoint(name)), device="cpu", dtype=dtype))
    asked = asked_of(name)
    alone, single = driven(pipeline, asked, "exact")
    for _ in range(2):
        together, rows = driven(pipeline, asked, "throughput", apart=3)
        largest = max((one - other).abs().max() for one, other in zip(alone, together, strict=True))
        assert largest <= (2e-5 if dtype == "float32" else 2e-2)
        assert max((one - alone[0]).abs().max() for one in alone[1:]) > 10 * largest, "the requests are unlike"
    assert max(rows) >= 2 * max(single) and sum(rows) == sum(single), "without trials, each row is made once"
    assert len(rows) < len(single)
    records = records_of(pipeline)
    assert any(record.proofs for record in records) and not any(record.apart for record in records)
    again, _ = driven(pipeline, asked, "exact")
    assert all(map(torch.equal, again, alone)), "what was learnt changes nothing of exact requests"


def test_a_network_whose_rows_know_each_other_is_made_apart_to_the_byte(checkpoint):
    pipeline = load_pipeline(ServerArgs(str(checkpoint("StableDiffusion3Pipeline")), device="cpu"))
    asked = asked_of("StableDiffusion3Pipeline")
    network = pipeline.get_module("transformer")
    handle = network.register_forward_hook(lambda _, __, out: (out[0] + out[0].mean(0) * 1e-3,))
    alone, single = driven(pipeline, asked, "exact")
    together, rows = driven(pipeline, asked, "throughput")
    handle.remove()
    assert all(map(torch.equal, alone, together)) and rows == single
    (record,) = records_of(pipeline)
    assert record.apart and not record.proofs


class Toy(nn.Module):
    """A network with a table without rows, numbers in lists and dicts, and one fault, if any."""

    def __init__(self, fault=""):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.fault = nn.Linear(4, 4), fault

    def forward(self, hidden, time, more, table, scale=1.0):
        if self.fault == "random":
            hidden = hidden + torch.randn(1)
        if self.fault == "first row":
            time = time.reshape(-1)[0]
        if self.fault == "small":
            hidden = hidden + 1e-3 * hidden.mean(0)
        if self.fault == "raises" and len(hidden) > 1:
            raise RuntimeError("one row alone")
        if self.fault == "sums":
            return hidden.sum()
        made = self.inner(hidden + time.reshape(-1, 1)) * scale + more["text"][0] + table.sum()
        return {"made": made, "kind": "toy"}


def forward_of(records, seed, time=None, table=0.0, rows=1, network="toy", **static):
    torch.manual_seed(seed)
    arguments = {
        "hidden": torch.randn(rows, 4),
        "time": torch.tensor(float(seed if time is None else time)),
        "more": {"text": [torch.randn(rows, 4)]},
        "table": torch.full((3, 2), table),
        **static,
    }
    signature = (TreeSignature(network, arguments, records),)
    return Forward(ModelCall("toy", arguments, {}, signature, CallKey(f"r{seed}/0", "0", 0)), ())


def made_by(network, forwards, dtype=torch.float32):
    """Make forwards through the wrapper; return the results, and how many rows each call of the network had."""
    rows = []

    def make(given):
        results = []
        for each in given:
            trial = each.call.static.get("trial")
            arguments = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in each.call.kwargs.items()}
            rows.append((len(arguments["hidden"]), trial))
            if trial == "float32":
                with InFloat32():
                    results.append(network(**arguments))
            else:
                results.append(network(**arguments))
        return results

    with torch.inference_mode():
        return ProvenStacking(CPU)(forwards, make), rows


@pytest.mark.parametrize("seed", [0, 10])
def test_the_first_meeting_is_a_trial_and_the_next_is_one_call(seed):
    records, network = Records(), Toy()
    forwards = [forward_of(records, seed + number) for number in range(2)]
    results, rows = made_by(network, forwards)
    assert rows == [(1, None), (1, None), (2, "stacked")]
    for forward, result in zip(forwards, results, strict=True):
        assert torch.equal(result["made"], network(**forward.call.kwargs)["made"]), "a trial's are those made apart"
    forwards = [forward_of(records, seed + number) for number in range(2, 5)]
    results, rows = made_by(network, forwards)
    assert rows == [(3, None)]
    for forward, result in zip(forwards, results, strict=True):
        assert (result["made"] - network(**forward.call.kwargs)["made"]).abs().max() < 1e-5
        assert result["kind"] == "toy" and result["made"].untyped_storage().nbytes() == 16


def test_what_was_equal_in_the_trial_has_to_be_equal_or_is_tried_again():
    records, network = Records(), Toy("first row")
    equal = [forward_of(records, number, time=1) for number in range(2)]
    assert made_by(network, equal)[1][-1] == (2, "stacked")
    assert made_by(network, equal)[1] == [(2, None)]
    _, rows = made_by(network, [forward_of(records, number) for number in range(2)])
    assert rows == [(1, None), (1, None), (2, "stacked")]
    assert made_by(network, equal)[1] == [(1, None), (1, None)], "a trial that fails is remembered"


def test_a_table_of_other_values_is_no_rows():
    records = Records()
    for _ in range(2):
        forwards = [forward_of(records, 1), forward_of(records, 2, table=1.0)]
        results, rows = made_by(Toy(), forwards)
        assert all(
            torch.equal(r["made"], Toy()(**f.call.kwargs)["made"]) for f, r in zip(forwards, results, strict=True)
        )
    assert rows == [(1, None), (1, None)]


@pytest.mark.parametrize("fault", ["small", "first row", "raises", "sums", "random"])
def test_a_trial_that_fails_is_remembered(fault):
    records, network = Records(), Toy(fault)
    for _ in range(2):
        first, second = forward_of(records, 1), forward_of(records, 2)
        made_by(network, [first, second])
    assert made_by(network, [forward_of(records, 1), forward_of(records, 2)])[1] == [(1, None), (1, None)]
    assert forward_of(records, 1).call.stack_key != forward_of(records, 2).call.stack_key, "they go their own ways"
    other = forward_of(records, 1, network="other"), forward_of(records, 2, network="other")
    assert other[0].call.stack_key == other[1].call.stack_key, "of this network alone"


def test_calls_of_other_trees_or_with_unknown_objects_never_meet():
    records = Records()
    plain = forward_of(records, 1)
    for other in ({"rows": 2}, {"scale": 1}, {"scale": 2.0}, {"scale": torch.Generator()}, {"network": "other"}):
        assert forward_of(records, 2, **other).call.stack_key != plain.call.stack_key
    assert forward_of(records, 2).call.stack_key == plain.call.stack_key
    unknown = forward_of(records, 1, scale=torch.Generator()), forward_of(records, 2, scale=torch.Generator())
    assert unknown[0].call.stack_key != unknown[1].call.stack_key


class Rounds(nn.Module):
    """A network of bfloat16 whose rows lie further from float32 when they are stacked, by a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, hidden):
        if hidden.dtype == torch.float32:
            return hidden * 1.0
        return hidden + 0.125 * (1 if len(hidden) == 1 else self.factor)


@pytest.mark.parametrize(("factor", "proven"), [(1.5, True), (2.5, False)])
def test_in_lower_precision_the_measure_is_the_distance_from_float32(factor, proven):
    records = Records()

    def forward(seed):
        arguments = {"hidden": torch.full((1, 4), float(seed), dtype=torch.bfloat16)}
        signature = (TreeSignature("rounds", arguments, records),)
        return Forward(ModelCall("rounds", arguments, {}, signature, CallKey(f"r{seed}/0", "0", 0)), ())

    network = Rounds(factor)
    _, rows = made_by(network, [forward(1), forward(2)], torch.bfloat16)
    assert (1, "float32") in rows
    assert made_by(network, [forward(1), forward(2)], torch.bfloat16)[1] == (
        [(2, None)] if proven else [(1, None), (1, None)]
    )


def test_roles_are_tried_in_the_order_of_likelihood():
    picture, scales, text = torch.randn(1, 4, 2, 2), torch.ones(1), torch.randn(1, 3, 4)
    frames, number = torch.randn(5, 2), torch.tensor(1.0)
    columns = [(each, each) for each in (picture, scales, text, frames, number)]
    assert possible_roles(columns, frozenset({0, 4})) == [
        ("rows", "rows", "rows", "shared", "scalar"),
        ("rows", "shared", "rows", "shared", "scalar"),
        ("rows", "shared", "shared", "shared", "scalar"),
    ]
    assert possible_roles(columns, frozenset({0, 3}))[0][3] == "rows", "five frames of a row"
    two = [(torch.randn(2, 4), torch.randn(2, 4)), (torch.randn(3), torch.randn(3))]
    assert possible_roles(two, frozenset({0, 1})) == [], "three numbers of two rows"
