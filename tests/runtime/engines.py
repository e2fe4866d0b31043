"""Engines in this process for tests: driven to their end, by a clock of the test's own."""

from __future__ import annotations


def drive(engine, until=None):
    while engine.tasks and not (until and until()):
        assert engine.tick()


class Clock:
    """A clock that only what is simulated moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
