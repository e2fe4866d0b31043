"""`DiffusionGenerator`: the Python API, in process."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from safelight.core.executor import PipelineExecutor, SyncExecutor
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare
from safelight.results import GenerationEvent, GenerationOutput, GenerationResult, make_output


class DiffusionGenerator:
    """A loaded model that makes pictures.

    >>> with DiffusionGenerator.from_pretrained() as generator:
    ...     generator.generate("a large red circle at the left on a white background").images[0].save("circle.png")
    """

    def __init__(self, pipeline: ComposedPipeline) -> None:
        self._executor: PipelineExecutor | None = SyncExecutor(pipeline)
        self.schema: ModelSchema = pipeline.schema

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **server_args: Any,
    ) -> Self:
        """Load a model.

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
        return cls(load_pipeline(args))

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
        if self._executor is None:
            raise UsageError("this generator is closed; load the model again")
        params, warnings = prepare(self.schema, self._fields(prompt, fields))
        return self._run(self._executor, params, warnings)

    def close(self) -> None:
        """Let go of the model and its memory. Closing twice does nothing."""
        self._executor = None

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
        self, executor: PipelineExecutor, params: SamplingParams, warnings: list[str]
    ) -> Iterator[GenerationEvent]:
        outputs: list[GenerationOutput] = []
        each = params.split()
        event = GenerationEvent("", 0, 0, 0, len(each))
        for index, single in enumerate(each):
            req = Req(request_id=uuid.uuid4().hex, params=single)
            for _ in executor.execute(req):
                done = GenerationEvent(req.stage, req.step_index, req.num_inference_steps, index, len(each))
                if done != event:
                    event = done
                    yield event
            outputs.append(make_output(req, self.schema.task.makes_video))
        yield dataclasses.replace(event, result=GenerationResult(outputs, params, self.schema, warnings))
