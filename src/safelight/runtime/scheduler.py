"""The scheduler (rank 0): takes requests from the channel, lets the engine work on them, and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from safelight.core.request import Req
from safelight.errors import OutOfMemoryError, SafelightError
from safelight.runtime.engine import Engine, is_out_of_memory
from safelight.runtime.messages import (
    Cancel,
    Compiled,
    Failed,
    Heartbeat,
    OutputMade,
    Progressed,
    Submit,
    ToWorker,
    array_to_image,
    join_images,
)
from safelight.runtime.policy import Task
from safelight.runtime.transport import WorkerChannel

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
SNAPSHOT_SECONDS = 0.2


class Scheduler:
    """Joins a channel to an engine.

    Args:
        engine: whose pipeline is loaded.
        channel: where requests come from and reports go to.

    """

    def __init__(self, engine: Engine, channel: WorkerChannel) -> None:
        self.engine = engine
        self.channel = channel
        self.snapshot = Heartbeat(0, 0, 0, {})
        self._outputs: dict[str, list[Task]] = {}
        self._snapshot_at = 0.0
        self._told_compiled = False

    def run(self) -> None:
        """Work until told to stop."""
        while self._take_all():
            touched = self.engine.tick()
            for task in touched:
                self._report(task, len(touched))
            self._report_compiled()
            self._take_snapshot()

    def _take_all(self) -> bool:
        """Take every message that is there, and wait for one where there is nothing to do; False to stop."""
        timeout = 0.0 if self.engine.busy else IDLE_SECONDS
        while (parcel := self.channel.receive(timeout)) is not None:
            message, frames = parcel
            if not self._take(message, frames):
                return False
            timeout = 0.0
        return True

    def _take(self, message: ToWorker, frames: Sequence[bytes]) -> bool:
        if isinstance(message, Submit):
            self._submit(message, frames)
        elif isinstance(message, Cancel):
            for task in self.engine.cancel(message.request_id)[:1]:
                self._fail(task)
        else:
            return False
        return True

    def _submit(self, message: Submit, frames: Sequence[bytes]) -> None:
        """Give the engine a task for each output."""
        schema = self.engine.pipeline.schema
        images = [
            (field, array_to_image(data, mode, width, height))
            for (field, mode, width, height), data in zip(message.images, frames, strict=True)
        ]
        try:
            params = join_images(schema.params_cls, message.fields, images)
        except SafelightError as error:
            self.channel.send(Failed(message.request_id, error.code, str(error), error.param))
            return
        self._outputs[message.request_id] = [
            self.engine.add(
                Req(message.request_id, single),
                priority=message.priority,
                deadline=message.deadline,
                mode=message.mode,
            )
            for single in params.split()
        ]

    def _report(self, task: Task, batch_size: int) -> None:
        """Tell what a tick did to a task, which shared it with others."""
        if task.error is not None:
            self._fail(task)
            return
        req = task.execution.req
        index = self._outputs[task.request_id].index(task)
        if not task.done:
            progress = Progressed(
                request_id=req.request_id,
                output_index=index,
                stage=req.stage,
                step=req.step_index,
                num_inference_steps=req.num_inference_steps,
                seconds_left=self.engine.policy.remaining(task),
                step_seconds=task.step_seconds,
                batch_size=batch_size,
                mode=task.mode or "eager",
            )
            self.channel.send(progress)
            return
        assert all(output.dtype == torch.uint8 for output in req.outputs), "the API process asks for pil alone"
        arrays = [output.numpy() for output in req.outputs]
        shapes = [array.shape for array in arrays]
        params, seed = req.params.described(), req.params.seed
        assert seed is not None
        made = OutputMade(req.request_id, index, shapes, seed, params, req.timings, req.warnings)
        self.channel.send(made, arrays)
        if all(other.done for other in self._outputs[task.request_id]):
            del self._outputs[task.request_id]

    def _report_compiled(self) -> None:
        """Tell once that the compiled form is there, or why it will not be."""
        compilation = self.engine.callers.compilation
        if compilation is None or compilation.state == "pending" or self._told_compiled:
            return
        self._told_compiled = True
        self.channel.send(Compiled(compilation.reason))

    def _fail(self, task: Task) -> None:
        """End the task's request: its other outputs too, with one answer."""
        error, task.error = task.error, None  # its traceback would keep what the unit held
        assert error is not None
        self.engine.cancel(task.request_id)
        self._outputs.pop(task.request_id, None)
        known = answerable(error)
        if not isinstance(error, SafelightError):
            logger.error("request %s failed", task.request_id, exc_info=error)
        self.channel.send(Failed(task.request_id, known.code, str(known), known.param))

    def _take_snapshot(self) -> None:
        """Remember what the heartbeat says, which another thread sends."""
        now = time.monotonic()
        if now < self._snapshot_at + SNAPSHOT_SECONDS and self.engine.tasks:
            return
        self._snapshot_at = now
        order = self.engine.order(self.engine.tasks, self.engine.clock())
        waiting = [task.request_id for task in order if not task.execution.started]
        positions = {request_id: index for index, request_id in enumerate(dict.fromkeys(waiting))}
        memory = torch.cuda.memory_allocated() if self.engine.pipeline.device.type == "cuda" else 0
        self.snapshot = Heartbeat(len(order) - len(waiting), len(waiting), memory, positions)


def answerable(error: Exception) -> SafelightError:
    """Return an error as the server may answer it: by name, and without internals."""
    if isinstance(error, SafelightError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError("this request needs more memory than there is; ask for less at once")
    return SafelightError("the request failed inside the server; its log says more")
