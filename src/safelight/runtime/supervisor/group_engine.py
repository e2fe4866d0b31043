"""A model on several devices of this machine, as the Python API sees it: a process each, which a supervisor starts."""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import SafelightError
from safelight.results import GenerationEvent, GenerationOutput, output_from_media
from safelight.runtime.client import GenerationRequest, Output, Progress
from safelight.runtime.settings import EngineSettings
from safelight.runtime.supervisor.supervisor import Supervisor

T = TypeVar("T")
STOP_SECONDS = 30.0


class GroupEngine:
    """Ranks that share every request, and die with this object.

    Args:
        server_args: of several devices.

    Attributes:
        schema: what the model takes.

    Raises:
        ModelError: if the model cannot be loaded.
        InvalidParameterError: if it cannot be divided as the settings say.

    """

    def __init__(self, server_args: ServerArgs) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="safelight-group", daemon=True)
        self._thread.start()
        self._supervisor = Supervisor(EngineSettings(server_args, max_running=1, warm_up=False))
        try:
            self._call(self._supervisor.start())
        except BaseException:
            self.close()
            raise
        assert self._supervisor.schema is not None, "it has been loaded"
        self.schema: ModelSchema = self._supervisor.schema

    def close(self) -> None:
        """End the processes. Closing twice does nothing."""
        if self._loop.is_closed():
            return
        self._call(self._supervisor.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)
        self._loop.close()

    def stream(self, each: list[SamplingParams]) -> Iterator[tuple[GenerationEvent, GenerationOutput | None]]:
        """Make one output after another, and yield how far they are; with an output's last event, the output.

        Closing the iterator stops the work within one step.
        """
        for index, single in enumerate(each):
            told: queue.SimpleQueue[Progress | list[Output] | SafelightError] = queue.SimpleQueue()
            request = GenerationRequest(uuid.uuid4().hex, single)
            following = asyncio.run_coroutine_threadsafe(self._follow(request, told), self._loop)
            last = GenerationEvent("", 0, single.num_steps(), index, len(each))
            try:
                while isinstance(said := told.get(), Progress):
                    last = GenerationEvent(said.stage, said.step, said.num_inference_steps, index, len(each))
                    yield last, None
                if isinstance(said, SafelightError):
                    raise said
                (made,) = said
                yield replace(last, step=last.num_inference_steps), _output(made, single, self.schema.task.makes_video)
            finally:
                self._loop.call_soon_threadsafe(self._supervisor.cancel, request.request_id)
                following.cancel()

    async def _follow(
        self, request: GenerationRequest, told: queue.SimpleQueue[Progress | list[Output] | SafelightError]
    ) -> None:
        """Submit a request, and pass on what is said of it, to its answer."""
        try:
            ticket = self._supervisor.submit(request)
            async for progress in ticket.changes():
                if progress.state == "running":
                    told.put(progress)
            told.put(await ticket.result())
        except SafelightError as error:
            told.put(error)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _output(made: Output, params: SamplingParams, makes_video: bool) -> GenerationOutput:
    media = [
        torch.from_numpy(array.copy() if isinstance(array, np.ndarray) else np.stack(list(array)))
        for array in made.media
    ]
    return output_from_media([*media, *made.sounds], params, made.timings, made.warnings, makes_video)
