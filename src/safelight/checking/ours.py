"""Our side of a comparison: one request, driven a unit at a time, looked at between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safelight.checking.record import (
    Kind,
    Recorder,
    block_names,
    recording_calls,
    recording_encoders,
    recording_modules,
    tensors_of,
)
from safelight.core.calls import ModelCall
from safelight.core.executor import Execution
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.errors import NonFiniteOutputError


@dataclass(frozen=True)
class OurRun:
    """What was recorded, and the first model call, so that it can be made again."""

    recorder: Recorder
    call: ModelCall


def run_ours(pipeline: ComposedPipeline, params: SamplingParams, encoders: Mapping[str, nn.Module]) -> OurRun:
    """Run one request to its end, and keep what it makes.

    Args:
        pipeline: ours.
        params: resolved, for one output.
        encoders: components that take text or images, by name.

    """
    recorder, req, num_steps = Recorder(), Req("check", params), 0
    with Execution(pipeline, req) as execution:
        with recording_encoders(recorder, encoders):
            while not req.in_loop and execution.advance():
                pass
        with torch.inference_mode():
            record_preparation(recorder, pipeline, req)
        call = req.pending[0]
        root = pipeline.get_module(call.component)
        with (
            recording_calls(recorder, root, call.component),
            recording_modules(recorder, root, call.component, block_names(root)),
        ):
            more = execution.advance()
        while True:
            if req.step_index > num_steps:
                num_steps = req.step_index
                recorder.add(f"latents after step {num_steps}", *tensors_of(req.latents))
            if not more:
                break
            try:
                more = execution.advance()
            except NonFiniteOutputError:  # the rows say where that began
                return OurRun(recorder, call)
    recorder.add("pixels", torch.stack(req.outputs))
    return OurRun(recorder, call)


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
