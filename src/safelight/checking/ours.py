"""Our side of a comparison: one request, driven a unit at a time, looked at between two."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from safelight.checking.record import Kind, Recorder, block_names, recording_calls, recording_encoders, tensors_of
from safelight.core.executor import Execution
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.errors import NonFiniteOutputError


def run_ours(
    pipeline: ComposedPipeline,
    params: SamplingParams,
    encoders: Mapping[str, nn.Module],
    models: Mapping[str, nn.Module],
) -> Recorder:
    """Run one request to its end, and return what it makes.

    Args:
        pipeline: ours.
        params: resolved, for one output.
        encoders: components that take text or images, by name.
        models: components that the loop calls, by name.

    """
    recorder, req = Recorder(), Req("check", params)

    def before_the_first_call(*_args: Any) -> None:
        if not recorder.calls:
            record_preparation(recorder, pipeline, req)

    with ExitStack() as watched:
        watched.enter_context(recording_encoders(recorder, encoders))
        for name, model in models.items():
            watched.enter_context(model.register_forward_pre_hook(before_the_first_call))
            watched.enter_context(recording_calls(recorder, name, model, block_names(model)))
        execution = watched.enter_context(Execution(pipeline, req))
        try:
            while execution.advance():
                if req.step_index > recorder.step:
                    recorder.step = req.step_index
                    recorder.add(f"latents after step {recorder.step}", *tensors_of(req.latents))
        except NonFiniteOutputError:  # the rows say where that began
            return recorder
    recorder.add("pixels", torch.stack(req.outputs))
    return recorder


def record_preparation(recorder: Recorder, pipeline: ComposedPipeline, req: Req) -> None:
    """Keep images, schedule and noise, as they are before the first step."""
    for index, latents in enumerate(req.image_latents):
        scale, shift = pipeline.config.get_decode_scale_and_shift(latents)
        recorder.add("image for the VAE", pipeline.config.prepare_vae_input(req, index))
        recorder.add("image latents", latents / scale + shift)
    assert isinstance(req.timesteps, Tensor)
    recorder.add("timesteps", req.timesteps, kind=Kind.EXACT)
    recorder.add("sigmas", torch.tensor(req.sigmas), kind=Kind.EXACT)
    recorder.add("initial noise", *tensors_of(req.latents), kind=Kind.EXACT)
