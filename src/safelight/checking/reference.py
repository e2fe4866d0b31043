"""The other side of a comparison: the pipeline of the diffusers package, called once, with hooks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.backends.annotations import takes_tuple
from safelight.checking.record import Kind, Recorder, recording_calls, recording_encoders, recording_method, tensors_of
from safelight.core.params import SamplingParams
from safelight.errors import UsageError

NOT_PASSED = frozenset({"seed", "n", "fps", "output_type"})
"""Fields that the reference has in other words, or not at all."""


def run_reference(
    pipe: Any, params: SamplingParams, encoders: Mapping[str, nn.Module], modules: Mapping[str, Sequence[str]]
) -> Recorder:
    """Call the reference, and return what it makes.

    Args:
        pipe: the pipeline of the diffusers package.
        params: as ours was given them.
        encoders: components that take text or images, by name.
        modules: of each model that the loop calls, the names of modules whose outputs are kept.

    Raises:
        UsageError: if the reference refuses the parameters.

    """
    recorder = Recorder()
    given = reference_arguments(pipe, params)

    def keep_encoded(encoded: Any, pixels: Tensor, *_args: Any, **_kwargs: Any) -> None:
        posterior = encoded[0]  # of a tuple, or of an output
        recorder.add("image for the VAE", pixels)
        recorder.add("image latents", posterior if isinstance(posterior, Tensor) else posterior.mode())

    def keep_noise(prepared: Any, *_args: Any, **_kwargs: Any) -> None:
        recorder.add("initial noise", prepared[0] if isinstance(prepared, tuple) else prepared, kind=Kind.EXACT)

    def on_step_end(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            recorder.add("timesteps", running.scheduler.timesteps, kind=Kind.EXACT)
            recorder.add("sigmas", torch.as_tensor(running.scheduler.sigmas), kind=Kind.EXACT)
        recorder.step = step + 1
        recorder.add(f"latents after step {recorder.step}", *tensors_of(tensors["latents"]))
        return tensors

    with ExitStack() as watched:
        watched.enter_context(recording_encoders(recorder, encoders))
        watched.enter_context(recording_method(pipe.vae, "encode", keep_encoded))
        watched.enter_context(recording_method(pipe, "prepare_latents", keep_noise))
        for name, names in modules.items():
            watched.enter_context(recording_calls(recorder, name, pipe.components[name], names))
        watched.enter_context(torch.inference_mode())
        try:
            media = pipe(**given, callback_on_step_end=on_step_end, output_type="np", return_dict=False)[0]
        except ValueError as error:  # how these pipelines refuse a value
            raise UsageError(f"{type(pipe).__name__}: {error}") from error
    recorder.add("pixels", torch.from_numpy(np.asarray(media[0])))
    return recorder


def reference_arguments(pipe: Any, params: SamplingParams) -> dict[str, Any]:
    """Return what ours was given, in the words of the reference."""
    given: dict[str, Any] = {}
    for theirs, parameter in inspect.signature(pipe.__call__).parameters.items():
        name = params.aliases.get(theirs, theirs)
        value = params.set_fields().get(name)
        if value is None or name in NOT_PASSED:
            continue
        if isinstance(value, tuple) and not takes_tuple(parameter.annotation):
            single = params.options()[name].kind == "images" and len(value) == 1
            value = value[0] if single else list(value)
        given[theirs] = value
    assert params.seed is not None
    return {**given, "generator": torch.Generator("cpu").manual_seed(params.seed)}
