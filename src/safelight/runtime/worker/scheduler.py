"""The scheduler (rank 0): takes requests from the channel, lets the engine work on them, and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from safelight.core.device import is_out_of_memory
from safelight.core.form import EAGER
from safelight.core.request import Req
from safelight.encoded import EncodedImage
from safelight.errors import CancelledError, OutOfMemoryError, SafelightError
from safelight.runtime.messages import (
    Cancel,
    Compiled,
    Failed,
    Heartbeat,
    OutputMade,
    Progressed,
    Stop,
    Submit,
    ToWorker,
    array_to_image,
    join_images,
    split_images,
)
from safelight.runtime.transport import WorkerChannel
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Task
from safelight.runtime.worker.ranks import ToWorkerParcel

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
SNAPSHOT_SECONDS = 0.2


class Intake:
    """Gives an engine what comes from the API process.

    Args:
        engine: whose pipeline is loaded.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[Task]] = {}

    def take(self, message: ToWorker, arrays: Sequence[bytes]) -> list[tuple[str, SafelightError]]:
        """Take a message; return the requests that it ends, each with its error.

        The engine is given a task for each output of a request.
        """
        if isinstance(message, Cancel):
            self._forget(message.request_id)
            cancelled = self.engine.cancel(message.request_id)
            return [(message.request_id, CancelledError("the request was cancelled"))] if cancelled else []
        assert isinstance(message, Submit)
        schema = self.engine.pipeline.schema
        images = [
            (field, array_to_image(data, mode, width, height, kind))
            for (field, mode, width, height, kind), data in zip(message.images, arrays, strict=True)
        ]
        try:
            params = join_images(schema.params_cls, message.fields, images)
        except SafelightError as error:
            return [(message.request_id, error)]
        if (refusal := self.engine.ranks.refusal(params)) is not None:
            return [(message.request_id, refusal)]
        self.outputs[message.request_id] = [
            self.engine.add(
                Req(message.request_id, single, index),
                priority=message.priority,
                deadline=message.deadline,
                form=message.form,
            )
            for index, single in enumerate(params.split())
        ]
        return []

    def end(self, task: Task) -> Exception | None:
        """Forget a task's request when it is over, its other outputs too where one failed; return what ended it."""
        error, task.error = task.error, None  # its traceback would keep what the unit held
        if error is not None:
            self.engine.cancel(task.request_id)
        if error is not None or all(other.done for other in self.outputs.get(task.request_id, ())):
            self._forget(task.request_id)
        return error

    def _forget(self, request_id: str) -> None:
        """Let go of a request; large pictures' pixels go back to the system."""
        for task in self.outputs.pop(request_id, ()):
            for _, image in split_images(task.execution.req.params)[1]:
                if isinstance(image, EncodedImage):
                    image.let_go()


class Follower:
    """Carries out on another rank what rank 0 plans.

    Args:
        engine: this rank's.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._intake = Intake(engine)

    def run(self) -> None:
        """Follow until told to stop."""
        while (order := self.engine.ranks.follow()) is not None:
            for parcel in order.parcels():
                self._intake.take(*parcel)
            for task in self.engine.carry_out(order.plan(self.engine.tasks)):
                if task.done:
                    self._intake.end(task)


class Scheduler:
    """Joins a channel to an engine, on rank 0.

    Args:
        engine: whose pipeline is loaded.
        channel: where requests come from and reports go to.

    """

    def __init__(self, engine: Engine, channel: WorkerChannel) -> None:
        self.engine = engine
        self.channel = channel
        self.snapshot = Heartbeat(0, 0, 0, {})
        self._intake = Intake(engine)
        self._snapshot_at = 0.0
        self._told_compiled = False

    def run(self) -> None:
        """Work until told to stop."""
        while (parcels := self._take_all()) is not None:
            plan = self.engine.plan()
            self.engine.ranks.lead(plan, parcels)
            touched = self.engine.carry_out(plan)
            for task in touched:
                self._report(task, len(touched))
            self._report_compiled()
            self._take_snapshot()
        self.engine.ranks.stop()

    def _take_all(self) -> list[ToWorkerParcel] | None:
        """Take every message that is there, and wait for one where there is nothing to do; None to stop."""
        parcels: list[ToWorkerParcel] = []
        timeout = 0.0 if self.engine.busy else IDLE_SECONDS
        while (parcel := self.channel.receive(timeout)) is not None:
            if isinstance(parcel[0], Stop):
                return None
            parcels.append(parcel)
            for request_id, error in self._intake.take(*parcel):
                self.channel.send(Failed(request_id, error.code, str(error), error.param))
            timeout = 0.0
        return parcels

    def _report(self, task: Task, batch_size: int) -> None:
        """Tell what a tick did to a task, which shared it with others."""
        if task.request_id not in self._intake.outputs:  # another output of its request failed in the same tick
            return
        if task.error is not None:
            self._fail(task)
            return
        req = task.execution.req
        index = req.output_index
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
                form=task.form or EAGER,
            )
            self.channel.send(progress)
            return
        arrays = [(output.float() if output.is_floating_point() else output).numpy() for output in req.outputs]
        shapes = [array.shape for array in arrays]
        params, seed = req.params.described(), req.params.seed
        assert seed is not None
        dtypes = [str(array.dtype) for array in arrays]
        made = OutputMade(req.request_id, index, shapes, dtypes, seed, params, req.timings, req.warnings)
        self.channel.send(made, arrays)
        self._intake.end(task)

    def _report_compiled(self) -> None:
        """Tell once that the compiled form is there, or why it will not be."""
        compilation = self.engine.runner.compilation
        if compilation is None or compilation.state == "pending" or self._told_compiled:
            return
        self._told_compiled = True
        self.channel.send(Compiled(compilation.reason))

    def _fail(self, task: Task) -> None:
        """End the task's request: its other outputs too, with one answer."""
        error = self._intake.end(task)
        assert error is not None
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
        order = self.engine.policy.order(self.engine.tasks, self.engine.clock())
        waiting = [task.request_id for task in order if not task.execution.started]
        positions = {request_id: index for index, request_id in enumerate(dict.fromkeys(waiting))}
        device = self.engine.pipeline.device
        memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.snapshot = Heartbeat(len(order) - len(waiting), len(waiting), memory, positions)


def answerable(error: Exception) -> SafelightError:
    """Return an error as the server may answer it: by name, and without internals."""
    if isinstance(error, SafelightError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError("this request needs more memory than there is; ask for less at once")
    return SafelightError("the request failed inside the server; its log says more")
