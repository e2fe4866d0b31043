"""One request through the reference and through ours, and what each made on its way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.core.executor import Execution
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.testing.recipes import Recipe, references_own_warnings

NOT_PASSED = ("seed", "n", "fps", "scheduler")
"""The reference has a list of generators, a list of prompts and a solver of its own, and leaves the frame rate to
whoever writes the file."""

States = dict[tuple[Any, ...], list[Tensor]]
"""What encoders made, by the encoder and the row that it was given."""


@dataclass
class Expected:
    """What the reference made of a case; the batch comes first."""

    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    timesteps: Tensor = field(default_factory=lambda: torch.zeros(0))
    pixels: Any = ()
    made: States = field(default_factory=dict)


def distance(req: Req, pixels: Any) -> float:
    """Return the largest difference between what a request made and the reference's pixels."""
    theirs = np.asarray(pixels)
    pictures = np.stack([picture.numpy() for picture in req.outputs]).reshape(theirs.shape)
    return float(np.abs(pictures - theirs).max())


def encoders_of(pipeline: Any, recipe: Recipe) -> tuple[list[Any], nn.Module | None]:
    """Return the text encoders and the image encoder of a pipeline, of ours or of the reference's."""
    owner = SimpleNamespace(**pipeline.components.modules) if isinstance(pipeline, ComposedPipeline) else pipeline
    return [attrgetter(name)(owner) for name in recipe.text_encoders], getattr(owner, "image_encoder", None)


def run_reference(pipe: Any, recipe: Recipe, reqs: Sequence[Req]) -> Expected:
    """Return what the reference makes of the requests: called once with lists, or once a request."""
    if not recipe.one_at_a_time:
        return call_reference(pipe, recipe, reqs)
    each = [call_reference(pipe, recipe, [req]) for req in reqs]
    expected = each[0]
    expected.noise = torch.cat([one.noise for one in each])
    expected.steps = [torch.cat(latents) for latents in zip(*(one.steps for one in each), strict=True)]
    expected.pixels = [one.pixels[0] for one in each]
    for key, states in (row for one in each[1:] for row in one.made.items()):
        expected.made[key] += states
    return expected


def call_reference(pipe: Any, recipe: Recipe, reqs: Sequence[Req]) -> Expected:
    """Call the reference once for all requests, and keep what it makes."""
    expected = Expected()
    prepare_latents = pipe.prepare_latents

    def recording(*args: Any, **kwargs: Any) -> Any:
        returned = prepare_latents(*args, **kwargs)
        expected.noise = (returned[0] if isinstance(returned, tuple) else returned).clone()
        return returned

    def record(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        expected.steps.append(tensors["latents"].clone())
        return tensors

    pipe.prepare_latents = recording
    try:
        with references_own_warnings(), encodings(encoders_of(pipe, recipe)) as expected.made:
            expected.pixels = pipe(
                **reference_arguments(recipe, reqs),
                generator=[torch.Generator().manual_seed(req.params.seed or 0) for req in reqs],
                callback_on_step_end=record,
                return_dict=False,
            )[0]
    finally:
        del pipe.prepare_latents
    expected.sigmas, expected.timesteps = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps
    return expected


def reference_arguments(recipe: Recipe, reqs: Sequence[Req]) -> dict[str, Any]:
    """Return what the requests ask for, in the words of the reference."""
    params = reqs[0].params
    names = {name: recipe.to_diffusers.get(name, name) for name in params.options()}
    fields = {names[name]: value for name, value in params.set_fields().items() if name not in NOT_PASSED}
    for name, option in {} if recipe.one_at_a_time else params.options().items():
        if names[name] in fields and option.kind in ("string", "strings") and not option.choices:
            fields[names[name]] = [vars(req.params)[name] for req in reqs]
    for name, value in fields.items():
        fields[name] = list(value) if isinstance(value, tuple) else value
    if params.image is not None:
        fields["image"] = list(params.image) if len(params.image) > 1 else params.image[0]
    return fields


def run_ours(pipeline: ComposedPipeline, req: Req) -> tuple[Any, list[Any]]:
    """Drive a request to its end; return its initial noise, and its latents after each step."""
    noise: Any = None
    steps: list[Any] = []
    with Execution(pipeline, req) as execution:
        while execution.advance():
            if noise is None and req.latents is not None:
                noise = req.latents
            if req.step_index > len(steps):
                steps.append(req.latents)
    return noise, steps


@contextmanager
def encodings(encoders: tuple[Sequence[Any], nn.Module | None]) -> Iterator[States]:
    """Record what encoders of text and of images make: hidden states by the encoder and the row that it was given.

    A row of text is its token ids, and its states are [S, C], both without what is masked; a picture is its number, and
    its states are those that models are given.
    """
    text_encoders, image_encoder = encoders
    made: States = defaultdict(list)

    def text_hook(index: int) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            seen = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
            for row, kept, states in zip(ids, seen.bool(), output["last_hidden_state"], strict=True):
                made[index, *row[kept].tolist()].append(states[kept].clone())

        return record

    def image_hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        for row, states in enumerate(output.hidden_states[-2]):
            made["image", row].append(states.clone())

    # Inside a language model with a head, which one side may have and the other not.
    bodies = [getattr(encoder, "base_model", encoder) for encoder in text_encoders]
    handles = [body.register_forward_hook(text_hook(i), with_kwargs=True) for i, body in enumerate(bodies)]
    if image_encoder is not None:
        handles.append(image_encoder.register_forward_hook(image_hook, with_kwargs=True))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def difference_of_states(ours: States, theirs: States) -> float:
    """Return how far ours are from the nearest of theirs with the same key, in parts of the largest value above 1.

    One row may be encoded several times, and in another context: a token of a caption, after other tokens.
    """

    def difference(left: Tensor, right: Tensor) -> float:
        return float((left - right).abs().max()) / max(1.0, float(right.abs().max()))

    return max(
        min(difference(mine, other) for other in theirs[key] if other.shape == mine.shape)
        for key, states in ours.items()
        for mine in states
    )
