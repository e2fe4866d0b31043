"""Code that calls back after every step, turned into steps: a thread that moves only while its owner waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

POLL_SECONDS = 1.0
"""How often a waiting side looks whether the other is still there."""


class Cancelled(BaseException):
    """Raised inside the work when its owner gives up."""


class StepThread:
    """Runs `work(pause)` in a thread of its own; at each call of `pause` the owner goes on, and the work waits.

    Exactly one of the two runs at any time, so the work sees the same world as if it were called directly.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name="safelight-step", daemon=True)
        self._resumed = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._cancelled = False
        self._error: BaseException | None = None

    def resume(self) -> bool:
        """Let the work run to its next pause; False when it is done.

        Raises:
            BaseException: whatever the work raised.

        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resumed.release()
        while not self._paused.acquire(timeout=POLL_SECONDS):
            assert self._thread.is_alive(), "the thread always says when it ends"
        if self._error is not None:
            raise self._error
        return self._finished is False

    def cancel(self) -> None:
        """End the work where it waits. After the work has ended this does nothing."""
        self._cancelled = True
        if self._thread.is_alive():
            self._resumed.release()
            self._thread.join()

    _finished = False

    def _run(self) -> None:
        try:
            self._work(self._pause)
        except Cancelled:
            pass
        except BaseException as error:  # a thread's boundary: the owner raises it again
            self._error = error
        self._finished = True
        self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        while not self._resumed.acquire(timeout=POLL_SECONDS):
            if self._cancelled or not threading.main_thread().is_alive():
                raise Cancelled
        if self._cancelled:
            raise Cancelled
