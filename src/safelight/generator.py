"""`DiffusionGenerator`: the Python API, in process."""

from __future__ import annotations

import dataclasses
import os
import secrets
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from safelight import media
from safelight.core.executor import PipelineExecutor, SyncExecutor
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.results import GenerationEvent, GenerationOutput, GenerationResult, make_output

SEED_RANGE = 2**53
"""Drawn seeds stay below it, so that a browser's JSON holds them."""


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


def prepare(schema: ModelSchema, fields: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
    """Return what was asked for as resolved parameters, images opened and seed drawn, and what to warn of.

    Raises:
        UsageError: for what the model does not take; the message names the field.

    """
    asked = schema.params_cls.from_fields(fields)
    images = _as_list(asked.image)
    if images:
        opened = tuple(media.open_image(image, mode=asked.image_mode) for image in images)
        asked = dataclasses.replace(asked, image=opened)
    single = [name for name, option in asked.options().items() if option.kind == "image"]
    others: dict[str, Any] = {name: value for name, value in asked.set_fields().items() if name in single}
    others = {name: media.open_image(value, name, asked.image_mode) for name, value in others.items()}
    params = dataclasses.replace(asked, **others).resolve(schema)
    assert params.n is not None
    if params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbelow(SEED_RANGE - params.n))
    warnings = [*schema.notes, *params.warnings(schema, asked.set_fields())]
    if asked.image_mode == "RGB" and any(media.has_alpha(image) for image in images):
        warnings.append("image: its alpha channel is not used")
    return params, warnings


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
