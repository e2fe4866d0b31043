"""Pipelines that sleep for their steps, and do what the directives in their prompt say."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from safelight.core.components import Components
from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage
from safelight.errors import InvalidParameterError
from safelight.runtime.worker.forward_estimator import ForwardEstimator
from safelight.stages.decoding import check_finite
from safelight.stages.denoising import DenoisingStage
from safelight_fault.config import FaultConfig

DIRECTIVE = re.compile(r"\[(\w+)@(\w+)(?::(\d+))?(?:=([\w.]+))?\]")
RANK_1 = "rank1_"
"""Before a deed that the second rank alone does."""
COST_WIDTH = 4
TOKENS = 64
"""Of which a step takes `step_seconds`: those of a picture of 64x64."""


def obey(batch: Any) -> None:
    """Do what the prompt says for this stage and step; of `forward`, when the model is called next."""
    for what, stage, step, value in DIRECTIVE.findall(batch.params.prompt):
        if int(step or 0) != batch.step_index or (what.startswith(RANK_1) and rank() != 1):
            continue
        deed = DEEDS[what.removeprefix(RANK_1)]
        if stage == batch.stage:
            deed(batch, value)
        elif (stage, batch.stage) == ("forward", "denoising"):
            Transformer.pending.append(functools.partial(deed, batch, value))


def rank() -> int:
    """Return which of the ranks of a request this is."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def oom(batch: Any, value: str) -> None:
    """Ask for more memory than there is."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (/usr/lib/secret.py at 0x7f00)")


def lose(batch: Any, value: str) -> None:
    """Fail as a device does that takes no more work from this process."""
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def fail(batch: Any, value: str) -> None:
    """Raise what nobody expects."""
    raise RuntimeError("internal: /home/somebody/secret.py at 0x7f0000000000")


def refuse(batch: Any, value: str) -> None:
    """Refuse a value that only the loaded model can judge."""
    raise InvalidParameterError("prompt", "it", "another one")


def fill(batch: Any, value: str) -> None:
    """Leave no room for the forward that comes."""
    mock.patch.object(ForwardEstimator, "fits", lambda *_: mock.patch.stopall()).start()  # once


def spin(batch: Any, value: str) -> None:
    """Hold the interpreter."""
    until = time.monotonic() + float(value or 1e9)
    while time.monotonic() < until:
        pass


def poison(batch: Any, value: str) -> None:
    """Turn the latents into NaN."""
    assert isinstance(batch.latents, Tensor)
    batch.latents = batch.latents * float("nan")


DEEDS: dict[str, Callable[[Any, str], Any]] = {
    "sleep": lambda batch, value: FaultPipeline.sleep(float(value)),
    "raise": fail,
    "refuse": refuse,
    "oom": oom,
    "lost": lose,
    "full": fill,
    "nan": poison,
    "exit": lambda batch, value: os._exit(7),
    "segv": lambda batch, value: os.kill(os.getpid(), signal.SIGSEGV),
    "spin": spin,
    "stop": lambda batch, value: os.kill(os.getpid(), signal.SIGSTOP),
}


class Transformer(nn.Module):
    """One linear layer that takes its time: in proportion to the tokens of a row, as long whatever the rows."""

    pending: ClassVar[list[Callable[[], Any]]] = []

    def __init__(self, step_seconds: float) -> None:
        super().__init__()
        self.step_seconds = step_seconds
        self.layer = nn.Linear(COST_WIDTH, COST_WIDTH)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.4, 0.5, COST_WIDTH**2).view(COST_WIDTH, COST_WIDTH))
            self.layer.bias.fill_(0.1)

    def forward(self, hidden_states: Tensor) -> Any:
        """Return a prediction, [B, S, 4] from [B, S, 4]."""
        if self.pending:
            self.pending.pop()()
        FaultPipeline.sleep(self.step_seconds * hidden_states.shape[1] / TOKENS)
        return self.layer(hidden_states)


class Encoding(PipelineStage):
    """Draws the noise from the seed; the prompt, without its directives, shifts it."""

    def forward(self, batch: Any, server_args: ServerArgs) -> Any:
        """Fill what the loop needs."""
        obey(batch)
        params = batch.params
        frames = ((params.num_frames or 1) - 1) // 4 + 1
        batch.raw_latent_shape = (1, frames * (params.height // 8) * (params.width // 8), COST_WIDTH)
        batch.generator = torch.Generator().manual_seed(params.seed)
        text = DIRECTIVE.sub("", params.prompt).strip()
        batch.latents = torch.randn(batch.raw_latent_shape, generator=batch.generator) + len(text) / 100
        for image in params.image or ():
            batch.latents = batch.latents + sum(image.resize((1, 1)).getpixel((0, 0))) / 765
        batch.num_inference_steps = params.num_inference_steps
        batch.timesteps = torch.linspace(1, 0, batch.num_inference_steps + 1)[:-1]
        return batch


class Denoising(DenoisingStage):
    """The standard loop, with a solver of one line, and directives."""

    def calls(self, batch: Any, signatures: Any) -> Any:
        """Do what the prompt says, before the step."""
        obey(batch)
        return super().calls(batch, signatures)

    def advance(self, batch: Any, predictions: list[Any]) -> None:
        """Take a step."""
        prediction: Any = self.config.combine_guidance(batch, predictions, batch.timesteps[batch.step_index])
        batch.latents = 0.9 * batch.latents + 0.1 * prediction
        batch.step_index += 1


class Decoding(PipelineStage):
    """Shows the latents, each as a block of 8x8 pixels; a video in units of four frames, which take their time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, batch: Any, server_args: ServerArgs) -> Any:
        """Fill `outputs`."""
        batch.step_index = 0
        obey(batch)
        batch.step_index = batch.num_inference_steps
        check_finite(batch.latents, "latents")
        params = batch.params
        grid = batch.latents[0].view(-1, params.height // 8, params.width // 8, COST_WIDTH)[..., :3]
        batch.latents = (grid.sigmoid() * 255).round().to(torch.uint8)
        for index in range(len(batch.latents)):
            if index:
                yield []
            FaultPipeline.sleep(self.seconds)
            block = batch.latents[index].repeat_interleave(8, 0).repeat_interleave(8, 1)
            batch.outputs += [block[None]] * (1 if index == 0 else 4)
        made = torch.cat(batch.outputs)
        batch.outputs = [made if params.num_frames else made[0]]


class FaultPipeline(ComposedPipeline):
    """Pictures."""

    pipeline_name: ClassVar[str] = "FaultPipeline"
    sleep: ClassVar[Callable[[float], None]] = staticmethod(time.sleep)

    config: FaultConfig

    def __init__(self, components: Components, config: FaultConfig, schema: Any, server_args: ServerArgs) -> None:
        transformer = Transformer(config.step_seconds).requires_grad_(False)
        modules = {**components.modules, "transformer": transformer}
        super().__init__(dataclasses.replace(components, modules=modules), config, schema, server_args)

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the stages."""
        self.add_stage(Encoding(), "encoding")
        self.add_stage(Denoising(self.config), "denoising")
        self.add_stage(Decoding(self.config.decode_seconds), "decoding")


class FaultVideoPipeline(FaultPipeline):
    """Videos."""

    pipeline_name: ClassVar[str] = "FaultVideoPipeline"


EntryClass = [FaultPipeline, FaultVideoPipeline]
