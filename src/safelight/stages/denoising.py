"""The denoising loop: a coroutine that yields the model calls of each step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from safelight.core.calls import ModelCall
from safelight.core.config import PipelineConfig
from safelight.core.request import Prediction, Req
from safelight.core.server_args import ServerArgs
from safelight.core.solver import takes_generator
from safelight.core.stage import PipelineStage, Steps
from safelight.core.trees import Tree


@dataclass
class LoopState:
    """What is kept between two steps of a loop.

    Attributes:
        kept: what techniques on a call's way keep for the calls that follow, by technique and branch; what a step cache
            answers from, say.

    """

    kept: dict[tuple[str, str], Tree] = field(default_factory=dict)


class DenoisingStage(PipelineStage):
    """One yield a step: the calls of its guidance branches go out, their predictions come back."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Advance `latents` from noise to picture. The frame holds no tensor at a yield."""
        batch.stage_state = LoopState()
        signatures = {branch: self.config.call_signature(branch, batch) for branch in self.config.branches(batch)}
        while batch.step_index < batch.num_inference_steps:
            self.advance(batch, (yield self.calls(batch, signatures)))

    def calls(self, batch: Req, signatures: Mapping[str, tuple[Hashable, ...]]) -> list[ModelCall]:
        """Return the model calls of the step that comes, one a branch."""
        assert batch.timesteps is not None and batch.latents is not None
        t = batch.timesteps[batch.step_index]
        component = self.config.select_component(batch, t)
        calls = []
        for branch, signature in signatures.items():
            kwargs = self.config.prepare_branch_kwargs(branch, batch, batch.latents, t)
            shared = {name: kwargs.pop(name) for name in self.config.shared_kwargs}
            key = batch.key(branch, batch.step_index)
            calls.append(ModelCall(component, kwargs, shared, signature, key, model=batch.model))
        return calls

    def advance(self, batch: Req, predictions: list[Prediction]) -> None:
        """Let the solver take the step that the predictions allow."""
        assert batch.timesteps is not None
        t = batch.timesteps[batch.step_index]
        prediction = self.config.combine_guidance(batch, predictions, t)
        # A solver that draws noise draws it from the seed, and never from torch's own generator.
        noise = {"generator": batch.generator} if takes_generator(batch.scheduler.__class__) else {}
        batch.latents = batch.scheduler.step(prediction, t, batch.latents, return_dict=False, **noise)[0]
        batch.step_index += 1
