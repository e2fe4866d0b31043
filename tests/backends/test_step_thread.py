"""Code that calls back, as a coroutine: one of two threads runs, and nothing is left of the other."""

from __future__ import annotations

import threading

import pytest

from safelight.backends.step_thread import StepThread


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "safelight-step"]


def test_a_step_thread_runs_only_while_its_owner_waits():
    log = []

    def work(ask):
        for step in range(3):
            log.append(f"work {step}")
            log.append(f"work has {ask(step)}")

    thread, answer = StepThread(work), None
    for step in range(4):
        question = thread.resume(answer)
        log.append(f"owner {step}")
        assert question == (step if step < 3 else None)
        answer = f"answer {step}"
    own = [line for line in log if "has" not in line]
    assert own == ["work 0", "owner 0", "work 1", "owner 1", "work 2", "owner 2", "owner 3"]
    assert [line for line in log if "has" in line] == [f"work has answer {step}" for step in range(3)]
    thread.cancel()


def test_an_error_in_the_thread_is_the_owners():
    def work(ask):
        ask("what")
        raise KeyError("lost")

    thread = StepThread(work)
    assert thread.resume() == "what"
    with pytest.raises(KeyError, match="lost"):
        thread.resume("that")
    assert not threads()


def test_what_the_work_asks_while_it_is_cancelled_ends_it_too():
    seen = []

    def work(ask):
        try:
            ask("first")
        finally:
            seen.append("cleaning up")
            ask("second")
            seen.append("never")

    thread = StepThread(work)
    assert thread.resume() == "first"
    thread.cancel()
    assert seen == ["cleaning up"] and not threads()
