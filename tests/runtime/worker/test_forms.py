"""A request keeps the form that it began in: the switch to the compiled one falls between requests."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import as_tensor
from safelight.core.executor import SyncExecutor
from safelight.core.form import EAGER, Form
from safelight.core.model_runner import ModelRunner
from safelight.errors import CompilationError
from safelight.runtime.unit_board import UnitBoard, UnitLimits
from safelight.runtime.worker.engine import COMPILE_PATIENCE, Engine
from safelight.runtime.worker.watch import Watch
from tests.runtime.conftest import request
from tests.runtime.engines import Clock, drive

NUM_UNITS = 2
COMPILED = Form("compiled")


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

    def __call__(self, forwards, make):
        made = make(forwards)
        return [self.made(each, result) for each, result in zip(forwards, made, strict=True)]

    def made(self, forward, result):
        return result if forward.form == EAGER else 1.5 * as_tensor(result)


@pytest.fixture
def pipeline(fault_pipeline):
    return fault_pipeline()


class CompilingEngine(Engine):
    """An engine of a pipeline that compiles, by a stub."""

    def __init__(self, pipeline, compilation, **settings):
        super().__init__(pipeline, **settings)
        self.runner.compilation = compilation
        ModelRunner.__init__(self.runner, pipeline, [*self.runner.way, compilation])


@pytest.fixture
def compilation():
    return StubCompilation()


def alone(pipeline, compilation, form, **fields):
    req = request(pipeline, **fields)
    for _ in SyncExecutor(pipeline, ModelRunner(pipeline, [compilation]), form).execute(req):
        pass
    return req.outputs[0]


@pytest.fixture
def expected(pipeline, compilation):
    made = {form: alone(pipeline, compilation, form) for form in (EAGER, COMPILED)}
    assert not torch.equal(made[EAGER], made[COMPILED])
    return made


def finish_compiling(engine):
    engine.runner.compilation.due = True
    while engine.runner.compilation.state == "pending":
        engine.tick()


def test_the_switch_falls_between_requests(pipeline, compilation, expected):
    """A request under way stays eager when the compiled form is there, and the next one is compiled."""
    compilation.due = False
    engine = CompilingEngine(pipeline, compilation)
    first = engine.add(request(pipeline, request_id="first"))
    while first.execution.req.step_index < 2:
        engine.tick()
    compilation.state = "ready"
    second = engine.add(request(pipeline, request_id="second"))
    drive(engine)
    assert (first.form, second.form) == (EAGER, COMPILED)
    assert torch.equal(first.execution.req.outputs[0], expected[EAGER])
    assert torch.equal(second.execution.req.outputs[0], expected[COMPILED])


def test_all_outputs_of_a_request_have_one_form(pipeline, compilation, expected):
    compilation.due = False
    engine = CompilingEngine(pipeline, compilation, max_running=1)
    tasks = [engine.add(request(pipeline, request_id="r0")) for _ in range(3)]
    engine.tick()
    compilation.state = "ready"
    drive(engine)
    assert {task.form for task in tasks} == {EAGER}
    assert all(torch.equal(task.execution.req.outputs[0], expected[EAGER]) for task in tasks)


def test_nothing_is_compiled_while_a_request_lives_unless_it_has_waited_long(pipeline, compilation):
    clock = Clock()
    engine = CompilingEngine(pipeline, compilation, clock=clock)
    engine.add(request(pipeline))
    for _ in range(3):
        assert engine.tick()
    assert compilation.num_done == 0
    clock.now += COMPILE_PATIENCE + 1
    assert not engine.tick() and compilation.num_done == 1
    finish_compiling(engine)
    (task,) = engine.tasks
    drive(engine)
    assert task.form == EAGER


@pytest.mark.parametrize("form", [EAGER, COMPILED])
def test_a_request_that_runs_again_has_the_form_that_it_began_in(pipeline, compilation, expected, form):
    """Compiled, it waits for the form, which is then made at once, and lets others go before."""
    compilation.due = False
    engine = CompilingEngine(pipeline, compilation)
    again = engine.add(request(pipeline, request_id="again"), form=form)
    other = engine.add(request(pipeline, request_id="other"))
    while not other.done:
        engine.tick()
    assert again.execution.started == (form == EAGER) and other.form == EAGER
    finish_compiling(engine)
    drive(engine)
    assert torch.equal(again.execution.req.outputs[0], expected[form])


def test_an_engine_whose_tasks_all_wait_for_the_form_is_not_busy(pipeline, compilation):
    """The scheduler sleeps between two looks at the process that compiles."""
    compilation.due = False
    engine = CompilingEngine(pipeline, compilation)
    engine.add(request(pipeline, request_id="again"), form=COMPILED)
    assert not engine.busy and not engine.tick()
    compilation.due = True
    assert engine.busy
    finish_compiling(engine)
    assert engine.busy
    drive(engine)
    assert not engine.busy


def test_who_waits_for_a_form_that_cannot_be_made_is_told(pipeline, compilation):
    compilation.fails = True
    engine = CompilingEngine(pipeline, compilation)
    again = engine.add(request(pipeline, request_id="again"), form=COMPILED)
    engine.tick()
    assert engine.tick() == [again] and isinstance(again.error, CompilationError)
    later = engine.add(request(pipeline, request_id="later"))
    drive(engine)
    assert later.error is None and later.form == EAGER


def test_a_form_means_nothing_to_an_engine_that_does_not_compile(pipeline, expected):
    """Its settings have changed since, and so may everything else."""
    engine = Engine(pipeline)
    task = engine.add(request(pipeline), form=COMPILED)
    drive(engine)
    assert task.form == EAGER and torch.equal(task.execution.req.outputs[0], expected[EAGER])


def test_forms_are_not_stacked_together(pipeline, compilation):
    rows: dict[Form, set[int]] = {EAGER: set(), COMPILED: set()}

    def counted(forward, result):
        rows[forward.form].add(forward.call.num_rows)
        return result

    compilation.made = counted
    compilation.state = "ready"
    engine = CompilingEngine(pipeline, compilation, batching="throughput", max_running=8, clock=Clock())
    forms: list[Form | None] = [EAGER, COMPILED, EAGER, None, COMPILED]
    for index, form in enumerate(forms):
        engine.add(request(pipeline, request_id=f"r{index}"), form=form)
    drive(engine)
    assert (max(rows[EAGER]), max(rows[COMPILED])) == (2, 3)


def test_a_unit_of_compiling_may_take_as_long_as_a_first_one(pipeline, compilation, tmp_path, monkeypatch):
    """Each is announced as nobody's, and as the first of its kind."""
    board = UnitBoard(tmp_path / "unit")
    advance, seen = compilation.advance, []

    def watched():
        seen.append(board.read())
        advance()

    monkeypatch.setattr(compilation, "advance", watched)
    engine = CompilingEngine(pipeline, compilation, watch=Watch(board, UnitLimits(least=1, first=900)))
    engine.tick()
    engine.tick()
    announced = [(unit.kind, unit.requests, unit.limit) for unit in seen if unit is not None]
    assert announced == [("compilation", (), 900.0)] * NUM_UNITS
    assert board.read() is None
    board.remove()
