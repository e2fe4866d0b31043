"""A request keeps the mode that it began with: the switch to the compiled form falls between requests."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import as_tensor
from safelight.acceleration.callers import Callers
from safelight.core.executor import SyncExecutor, make_call
from safelight.core.server_args import Mode
from safelight.errors import CompilationError
from safelight.runtime.engine import COMPILE_PATIENCE, Engine
from safelight.runtime.watch import UnitBoard, UnitLimits, Watch
from tests.runtime.conftest import request
from tests.runtime.test_engine import Clock, drive

NUM_UNITS = 2


class StubCompilation:
    """Is compiled after two units, once it is due; its form gives other bytes."""

    def __init__(self):
        self.state, self.reason, self.due, self.num_done = "pending", "", True, 0
        self.fails = False

    def is_due(self):
        return self.due and self.state == "pending"

    def advance(self):
        self.num_done += 1
        if self.fails:
            self.state, self.reason = "failed", "no compiler"
        elif self.num_done == NUM_UNITS:
            self.state = "ready"


@pytest.fixture
def pipeline(fault_pipeline):
    return fault_pipeline()


@pytest.fixture
def callers(pipeline):
    made = Callers(pipeline)
    made.compilation = StubCompilation()  # type: ignore[assignment]
    made._makers["compiled"] = lambda call: 1.5 * as_tensor(make_call(pipeline, call))
    return made


def alone(pipeline, callers, mode, **fields):
    req = request(pipeline, **fields)
    for _ in SyncExecutor(pipeline, callers.of(mode)).execute(req):
        pass
    return req.outputs[0]


@pytest.fixture
def expected(pipeline, callers):
    made = {mode: alone(pipeline, callers, mode) for mode in ("eager", "compiled")}
    assert not torch.equal(made["eager"], made["compiled"])
    return made


def finish_compiling(engine):
    engine.callers.compilation.due = True
    while engine.callers.compilation.state == "pending":
        engine.tick()


def test_the_switch_falls_between_requests(pipeline, callers, expected):
    """A request under way stays eager when the compiled form is there, and the next one is compiled."""
    callers.compilation.due = False
    engine = Engine(pipeline, callers=callers)
    first = engine.add(request(pipeline, request_id="first"))
    while first.execution.req.step_index < 2:
        engine.tick()
    callers.compilation.state = "ready"
    second = engine.add(request(pipeline, request_id="second"))
    drive(engine)
    assert (first.mode, second.mode) == ("eager", "compiled")
    assert torch.equal(first.execution.req.outputs[0], expected["eager"])
    assert torch.equal(second.execution.req.outputs[0], expected["compiled"])


def test_all_outputs_of_a_request_have_one_mode(pipeline, callers, expected):
    callers.compilation.due = False
    engine = Engine(pipeline, callers=callers, max_running=1)
    tasks = [engine.add(request(pipeline, request_id="r0")) for _ in range(3)]
    engine.tick()
    callers.compilation.state = "ready"
    drive(engine)
    assert {task.mode for task in tasks} == {"eager"}
    assert all(torch.equal(task.execution.req.outputs[0], expected["eager"]) for task in tasks)


def test_nothing_is_compiled_while_a_request_lives_unless_it_has_waited_long(pipeline, callers):
    clock = Clock()
    engine = Engine(pipeline, callers=callers, clock=clock)
    engine.add(request(pipeline))
    for _ in range(3):
        assert engine.tick()
    assert callers.compilation.num_done == 0
    clock.now += COMPILE_PATIENCE + 1
    assert not engine.tick() and callers.compilation.num_done == 1
    finish_compiling(engine)
    (task,) = engine.tasks
    drive(engine)
    assert task.mode == "eager"


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_request_that_runs_again_has_the_mode_that_it_began_with(pipeline, callers, expected, mode):
    """Compiled, it waits for the form, which is then made at once, and lets others go before."""
    callers.compilation.due = False
    engine = Engine(pipeline, callers=callers)
    again = engine.add(request(pipeline, request_id="again"), mode=mode)
    other = engine.add(request(pipeline, request_id="other"))
    while not other.done:
        engine.tick()
    assert again.execution.started == (mode == "eager") and other.mode == "eager"
    finish_compiling(engine)
    drive(engine)
    assert torch.equal(again.execution.req.outputs[0], expected[mode])


def test_an_engine_whose_tasks_all_wait_for_the_form_is_not_busy(pipeline, callers):
    """The scheduler sleeps between two looks at the process that compiles."""
    callers.compilation.due = False
    engine = Engine(pipeline, callers=callers)
    engine.add(request(pipeline, request_id="again"), mode="compiled")
    assert not engine.busy and not engine.tick()
    callers.compilation.due = True
    assert engine.busy
    finish_compiling(engine)
    assert engine.busy
    drive(engine)
    assert not engine.busy


def test_who_waits_for_a_form_that_cannot_be_made_is_told(pipeline, callers):
    callers.compilation.fails = True
    engine = Engine(pipeline, callers=callers)
    again = engine.add(request(pipeline, request_id="again"), mode="compiled")
    engine.tick()
    assert engine.tick() == [again] and isinstance(again.error, CompilationError)
    later = engine.add(request(pipeline, request_id="later"))
    drive(engine)
    assert later.error is None and later.mode == "eager"


def test_a_mode_means_nothing_to_an_engine_that_does_not_compile(pipeline, expected):
    """Its settings have changed since, and so may everything else."""
    engine = Engine(pipeline)
    task = engine.add(request(pipeline), mode="compiled")
    drive(engine)
    assert task.mode == "eager" and torch.equal(task.execution.req.outputs[0], expected["eager"])


def test_modes_are_not_stacked_together(pipeline, callers):
    rows: dict[str, set[int]] = {"eager": set(), "compiled": set()}

    def counted(mode):
        def make(call):
            rows[mode].add(len(call.kwargs["hidden_states"]))
            return make_call(pipeline, call)

        return make

    callers._makers = {mode: counted(mode) for mode in rows}
    callers.compilation.state = "ready"
    engine = Engine(pipeline, callers=callers, batching="throughput", max_running=8, clock=Clock())
    modes: list[Mode | None] = ["eager", "compiled", "eager", None, "compiled"]
    for index, mode in enumerate(modes):
        engine.add(request(pipeline, request_id=f"r{index}"), mode=mode)
    drive(engine)
    assert (max(rows["eager"]), max(rows["compiled"])) == (2, 3)


def test_a_unit_of_compiling_may_take_as_long_as_a_first_one(pipeline, callers, tmp_path, monkeypatch):
    """Each is announced as nobody's, and as the first of its kind."""
    board = UnitBoard(tmp_path / "unit")
    advance, seen = callers.compilation.advance, []

    def watched():
        seen.append(board.read())
        advance()

    monkeypatch.setattr(callers.compilation, "advance", watched)
    engine = Engine(pipeline, callers=callers, watch=Watch(board, UnitLimits(least=1, first=900)))
    engine.tick()
    engine.tick()
    announced = [(unit.kind, unit.requests, unit.limit) for unit in seen if unit is not None]
    assert announced == [("compilation", (), 900.0)] * NUM_UNITS
    assert board.read() is None
    board.remove()
