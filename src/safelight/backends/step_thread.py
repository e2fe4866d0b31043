"""Code that calls back, turned into a coroutine: a thread that moves only while its owner waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 1.0
"""How often a waiting side looks whether the other is still there."""

Ask = Callable[[Any], Any]
"""Hands something to the thread's owner, and returns the answer."""


class Cancelled(BaseException):
    """Raised inside the work when its owner gives up."""


class StepThread:
    """Runs `work(ask)` in a thread of its own; what it asks goes to the owner, and it waits for the answer.

    Exactly one of the two runs at any time, so the work sees the same world as if it were called directly.
    """

    def __init__(self, work: Callable[[Ask], None]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name="safelight-step", daemon=True)
        # Locks as semaphores of two values: theirs are written in Python, and cost more than the change of threads.
        self._answered, self._asked = threading.Lock(), threading.Lock()
        self._answered.acquire()
        self._asked.acquire()
        self._passed: Any = None
        self._cancelled = self._finished = False
        self._error: BaseException | None = None

    def resume(self, answer: Any = None) -> Any:
        """Let the work run, with the answer to what it asked, to its next question; return that.

        Returns:
            None when the work is done.

        Raises:
            BaseException: whatever the work raised.

        """
        self._passed = answer
        del answer  # the work alone keeps it
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answered.release()
        while not self._asked.acquire(timeout=POLL_SECONDS):
            assert self._thread.is_alive(), "the thread always says when it ends"
        if self._error is not None:
            raise self._error
        return None if self._finished else self._take()

    def cancel(self) -> None:
        """End the work where it waits. After the work has ended this does nothing."""
        self._cancelled = True
        if self._thread.is_alive():
            self._answered.release()
            self._thread.join()

    def _take(self) -> Any:
        passed, self._passed = self._passed, None
        return passed

    def _run(self) -> None:
        try:
            self._work(self._ask)
        except Cancelled:
            pass
        except BaseException as error:  # a thread's boundary: the owner raises it again
            self._error = error
        self._finished = True
        self._asked.release()

    def _ask(self, question: Any) -> Any:
        if self._cancelled:  # asked again while the work ends
            raise Cancelled
        self._passed = question
        self._asked.release()
        while not self._answered.acquire(timeout=POLL_SECONDS):
            if not threading.main_thread().is_alive():
                raise Cancelled
        if self._cancelled:
            raise Cancelled
        return self._take()
