"""What a tick does, chosen from tasks, clock and policy: the same for whoever asks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.runtime.worker.plan import Plan, plan_tick


def task(name, on_device=False, keys=(), started=True, deadline=math.inf, form="eager", movable=True, has_form=True):
    calls = [SimpleNamespace(stack_key=key, signature=key) for key in keys]
    req = SimpleNamespace(in_loop=bool(keys))
    made: Any = SimpleNamespace(name=name, on_device=on_device, calls=calls, form=form, has_form=has_form)
    made.execution = SimpleNamespace(req=req, started=started, pipeline=SimpleNamespace())
    made.is_movable = movable
    made.is_lost = lambda now: not started and now > deadline
    return made


class InOrder:
    """A policy that takes tasks as they are given."""

    def __init__(self, owed=None):
        self.owed = owed

    def order(self, tasks, now):
        return list(tasks)


def names_of(tasks: Any) -> list[str]:
    return [each.name for each in tasks]


def planned(tasks, max_running=2, stacks=False, last=None, owed=None):
    policy: Any = InOrder(owed)
    plan = plan_tick(tasks, 10.0, policy, max_running=max_running, stacks=stacks, last=last or Plan())
    again = plan_tick(tasks, 10.0, policy, max_running=max_running, stacks=stacks, last=last or Plan())
    assert plan == again, "it is a function of what it is given"
    return names_of(plan.resumed), names_of(plan.evicted), plan


def test_the_first_that_has_a_place_goes_on():
    assert planned([task("a", True), task("b")])[:2] == (["a"], [])
    assert planned([task("a"), task("b", True)])[:2] == (["a"], []), "there is a place"
    assert planned([]) == ([], [], Plan((), (), []))


def test_for_one_that_has_no_place_the_last_leaves():
    running = [task("b", True), task("c", True)]
    assert planned([task("a"), *running])[:2] == (["a"], ["c"])
    stuck = [task("b", True, movable=False), task("c", True, movable=False)]
    assert planned([task("a"), *stuck])[:2] == (["b"], [])


def test_who_is_too_late_is_dropped_and_who_waits_for_a_form_is_passed():
    late, waits = task("late", started=False, deadline=9.0), task("waits", has_form=False)
    names, _, plan = planned([late, waits, task("a")])
    assert names == ["a"] and names_of(plan.dropped) == ["late"]


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([task("b", True, keys=("k", "k"))], ["a", "b"]),
        ([task("b", True, keys=("other",))], ["a"]),
        ([task("b", True, keys=("k",), form="compiled")], ["a"]),
    ],
)
def test_companions_have_the_same_calls_and_form(others, names):
    assert planned([task("a", True, keys=("k",)), *others], stacks=True)[0] == names


def test_a_newcomer_goes_first_but_not_for_ever_before_what_is_owed():
    owed, newcomer = task("a", True, keys=("k",)), task("new")
    names, _, plan = planned([owed, newcomer], stacks=True)
    assert names == ["new"] and plan.admits
    assert planned([owed, newcomer], stacks=True, last=plan)[0] == ["new"]
    assert planned([owed, newcomer], stacks=True, last=plan, owed=owed)[0] == ["a"]
