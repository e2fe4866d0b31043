"""`DiffusionGenerator`: the Python API, in process."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from safelight.client import RemoteEngine
from safelight.core.executor import SyncExecutor
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.results import GenerationEvent, GenerationOutput, GenerationResult, output_from_media
from safelight.runtime.supervisor.group_engine import GroupEngine
from safelight.runtime.worker.model_runner import PipelineRunner


class DiffusionGenerator:
    """A loaded model that makes pictures.

    >>> with DiffusionGenerator.from_pretrained() as generator:
    ...     generator.generate("a large red circle at the left on a white background").save("circle.png")
    """

    def __init__(self, engine: ComposedPipeline | GroupEngine | RemoteEngine) -> None:
        self._engine: _LocalEngine | GroupEngine | RemoteEngine | None
        self._engine = _LocalEngine(engine) if isinstance(engine, ComposedPipeline) else engine
        self.schema: ModelSchema = engine.schema

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **server_args: Any,
    ) -> Self:
        """Load a model. On several devices each has a process of its own, which ends with this object.

        Args:
            model: a folder in Diffusers layout, or a Hub id, optionally with `@revision`; None is the shipped model.
            device: `auto` is CUDA where there is one, else the CPU.
            dtype: `auto` is float32 on the CPU and bfloat16 elsewhere.
            **server_args: further fields of `ServerArgs`.

        Raises:
            UnknownParameterError: for an unknown setting; the nearest is suggested.
            ModelError: if the model cannot be loaded.

        """
        known = [entry.name for entry in dataclasses.fields(ServerArgs)]
        for name in server_args:
            if name not in known:
                raise UnknownParameterError(name, known)
        args = ServerArgs(
            model=None if model is None else os.fspath(model),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            **server_args,
        )
        return cls(load_pipeline(args) if args.num_devices() == 1 else GroupEngine(args))

    @classmethod
    def connect(cls, url: str, *, api_key: str | None = None) -> Self:
        """Use the model of a server: the same methods, and pictures that are the same to the byte.

        Videos come as H.264, and `np` and `pt` are made from pictures of 8 bits.

        Args:
            url: of the server, such as `http://127.0.0.1:8000`.
            api_key: the server's, if it asks for one.

        Raises:
            ServerError: if there is no such server.

        """
        return cls(RemoteEngine(url, api_key))

    def generate(
        self, prompt: str | Sequence[str] | SamplingParams | None = None, /, **fields: Any
    ) -> GenerationResult:
        """Make pictures.

        Args:
            prompt: a prompt, a list of prompts, or parameters as an object.
            **fields: fields of the model's sampling parameters; they go before those of the object.

        Raises:
            UsageError: for what the model does not take; the message names the field.

        """
        result = None
        for event in self.stream(prompt, **fields):
            result = event.result
        assert result is not None
        return result

    def stream(
        self, prompt: str | Sequence[str] | SamplingParams | None = None, /, **fields: Any
    ) -> Iterator[GenerationEvent]:
        """Make pictures, telling after every step how far it is; the last event has the result.

        Bad parameters are refused at once. Leaving the loop stops the work within one step.
        """
        if self._engine is None:
            raise UsageError("this generator is closed; load the model again")
        params, warnings = prepare(self.schema, self._fields(prompt, fields))
        return self._run(self._engine, params, warnings)

    def close(self) -> None:
        """Let go of the model and its memory, or of the connection. Closing twice does nothing."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> Self:
        """Return itself: leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _fields(self, prompt: str | Sequence[str] | SamplingParams | None, fields: dict[str, Any]) -> dict[str, Any]:
        if isinstance(prompt, SamplingParams):
            return {**prompt.set_fields(), **fields}
        if prompt is None:
            return fields
        if "prompt" in fields:
            raise InvalidParameterError("prompt", fields["prompt"], "one value, and it is given as first argument too")
        return {"prompt": prompt, **fields}

    def _run(
        self, engine: _LocalEngine | GroupEngine | RemoteEngine, params: SamplingParams, warnings: list[str]
    ) -> Iterator[GenerationEvent]:
        outputs: list[GenerationOutput] = []
        each = params.split()
        event = GenerationEvent("", 0, 0, 0, len(each))
        for done, output in engine.stream(each):
            if output is not None:
                outputs.append(output)
            elif done != event:
                event = done
                yield event
        yield dataclasses.replace(event, result=GenerationResult(outputs, params, self.schema, warnings))


class _LocalEngine:
    """A pipeline in this process. Where its settings say so, the first call compiles it; then nothing runs eagerly."""

    def __init__(self, pipeline: ComposedPipeline) -> None:
        self._pipeline = pipeline
        self._runner = PipelineRunner(pipeline)
        if self._runner.compilation is not None:
            self._runner.compilation.check_toolchain()

    def close(self) -> None:
        """Nothing is held but memory."""

    def stream(self, each: list[SamplingParams]) -> Iterator[tuple[GenerationEvent, GenerationOutput | None]]:
        """Make one output after another, and yield how far they are; with an output's last event, the output."""
        self._runner.finish_compiling()
        executor = SyncExecutor(self._pipeline, self._runner, self._runner.form)
        request_id = uuid.uuid4().hex
        for index, single in enumerate(each):
            req = Req(request_id, single, index)
            for _ in executor.execute(req):
                yield _progress(req, index, len(each)), None
            makes_video = self._pipeline.schema.task.makes_video
            made = output_from_media(req.outputs, req.params, req.timings, req.warnings, makes_video)
            yield _progress(req, index, len(each)), made


def _progress(req: Req, index: int, count: int) -> GenerationEvent:
    return GenerationEvent(req.stage, req.step_index, req.num_inference_steps, index, count)
