"""The scheduler (rank 0): takes requests from the channel, lets the engine work on them, and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from safelight.core.device import is_out_of_memory
from safelight.core.form import EAGER
from safelight.core.request import Req
from safelight.core.sound import Sound
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
    array_to_image,
    join_images,
    split_images,
)
from safelight.runtime.transport import WorkerChannel
from safelight.runtime.worker.engine import Engine
from safelight.runtime.worker.policy import Task
from safelight.runtime.worker.ranks import RequestMessage

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
SNAPSHOT_SECONDS = 0.2


class InputProcessor:
    """Gives an engine what comes from the API process, a task for each output of a request.

    Args:
        engine: whose pipeline is loaded.

    Attributes:
        tasks: of each request that lives, by its id.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tasks: dict[str, list[Task]] = {}

    def process(self, message: Submit | Cancel, arrays: Sequence[bytes]) -> SafelightError | None:
        """Begin a request, or end it; return with what it ends."""
        if isinstance(message, Cancel):
            self._forget(message.request_id)
            return CancelledError("the request was cancelled") if self.engine.cancel(message.request_id) else None
        images = [
            (about.param, about.place, array_to_image(data, about))
            for about, data in zip(message.images, arrays, strict=True)
        ]
        try:
            params = join_images(self.engine.pipeline.schema.params_cls, message.fields, images)
        except SafelightError as error:
            return error
        if (refusal := self.engine.ranks.refusal(params)) is not None:
            return refusal
        self.tasks[message.request_id] = [
            self.engine.add(
                Req(message.request_id, single, index),
                priority=message.priority,
                deadline=message.deadline,
                form=message.form,
                tenant=message.tenant,
            )
            for index, single in enumerate(params.split())
        ]
        return None

    def end(self, task: Task) -> Exception | None:
        """Forget a task's request when it is over, its other outputs too where one failed; return what ended it."""
        error, task.error = task.error, None  # its traceback would keep what the unit held
        if error is not None:
            self.engine.cancel(task.request_id)
        if error is not None or all(other.done for other in self.tasks.get(task.request_id, ())):
            self._forget(task.request_id)
        return error

    def _forget(self, request_id: str) -> None:
        """Let go of a request; large pictures' pixels go back to the system."""
        for task in self.tasks.pop(request_id, ()):
            for _, _, image in split_images(task.execution.req.params)[1]:
                if isinstance(image, EncodedImage):
                    image.let_go()


class PlanExecutor:
    """Carries out on another rank what rank 0 plans.

    Args:
        engine: this rank's.

    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inputs = InputProcessor(engine)

    def run(self) -> None:
        """Follow until told to stop."""
        while (order := self.engine.ranks.follow()) is not None:
            for message, arrays in order.messages:
                self._inputs.process(message, arrays)
            for task in self.engine.carry_out(order.plan(self.engine.tasks)):
                if task.done:
                    self._inputs.end(task)


class Scheduler:
    """Joins a channel to an engine, on rank 0.

    Args:
        engine: whose pipeline is loaded.
        channel: where requests come from and reports go to.

    """

    def __init__(self, engine: Engine, channel: WorkerChannel) -> None:
        self.engine = engine
        self.channel = channel
        self.snapshot = Heartbeat(0, {})
        self._inputs = InputProcessor(engine)
        self._snapshot_at = 0.0
        self._told_compiled = False

    def run(self) -> None:
        """Work until told to stop."""
        while (messages := self._receive()) is not None:
            for message, arrays in messages:
                if (error := self._inputs.process(message, arrays)) is not None:
                    self.channel.send(failed(message.request_id, error))
            plan = self.engine.plan()
            self.engine.ranks.lead(plan, messages)
            touched = self.engine.carry_out(plan)
            for task in touched:
                self._report(task, len(touched))
            self._report_compiled()
            self._take_snapshot()
        self.engine.ranks.stop()

    def _receive(self) -> list[RequestMessage] | None:
        """Return every message that is there, and wait for one where there is nothing to do; None to stop."""
        messages: list[RequestMessage] = []
        timeout = 0.0 if self.engine.busy else IDLE_SECONDS
        while (received := self.channel.receive(timeout)) is not None:
            message, arrays = received
            if isinstance(message, Stop):
                return None
            assert isinstance(message, Submit | Cancel), "a worker starts once"
            messages.append((message, arrays))
            timeout = 0.0
        return messages

    def _report(self, task: Task, batch_size: int) -> None:
        """Tell what a tick did to a task, which shared it with others."""
        if task.request_id not in self._inputs.tasks:  # another output of its request failed in the same tick
            return
        if task.error is not None:
            self._fail(task)
        elif task.done:
            self._send_output(task.execution.req)
            self._inputs.end(task)
        else:
            req = task.execution.req
            progress = Progressed(
                request_id=req.request_id,
                output_index=req.output_index,
                stage=req.stage,
                step=req.step_index,
                num_inference_steps=req.num_inference_steps,
                seconds_left=self.engine.policy.remaining(task),
                step_seconds=task.step_seconds,
                batch_size=batch_size,
                form=task.form or EAGER,
            )
            self.channel.send(progress)

    def _send_output(self, req: Req) -> None:
        """Send a finished output's media, and what is known of it."""
        sounds = [output for output in req.outputs if isinstance(output, Sound)]
        tensors = [*(each for each in req.outputs if not isinstance(each, Sound)), *(each.samples for each in sounds)]
        arrays = [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in tensors]
        assert req.params.seed is not None
        made = OutputMade(
            request_id=req.request_id,
            output_index=req.output_index,
            shapes=[array.shape for array in arrays],
            dtypes=[str(array.dtype) for array in arrays],
            seed=req.params.seed,
            params=req.params.described(),
            timings=req.timings,
            warnings=req.warnings,
            rates=[sound.sampling_rate for sound in sounds],
        )
        self.channel.send(made, arrays)

    def _report_compiled(self) -> None:
        """Tell once that the compiled form is there, or why it will not be."""
        compilation = self.engine.runner.compilation
        if compilation is None or compilation.state == "pending" or self._told_compiled:
            return
        self._told_compiled = True
        self.channel.send(Compiled(compilation.reason))

    def _fail(self, task: Task) -> None:
        """End the task's request: its other outputs too, with one answer."""
        error = self._inputs.end(task)
        assert error is not None
        self.channel.send(failed(task.request_id, error))

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
        self.snapshot = Heartbeat(memory, positions)


def failed(request_id: str, error: Exception) -> Failed:
    """Return what may be said of an error that ended a request: its name, and no internals, which the log has."""
    if not isinstance(error, SafelightError):
        logger.error("request %s failed", request_id, exc_info=error)
        if is_out_of_memory(error):
            error = OutOfMemoryError("this request needs more memory than there is; ask for less at once")
        else:
            error = SafelightError("the request failed inside the server; its log says more")
    return Failed(request_id, error.code, str(error), error.param)
