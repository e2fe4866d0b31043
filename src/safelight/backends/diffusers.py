"""Any pipeline of the diffusers package, a step at a time: progress, cancel and interleaving as for our own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from safelight.backends.image_positions import tell_where_images_are
from safelight.backends.refusals import refusal
from safelight.backends.signature import PackageParams, parameters_of, params_from_signature, takes_tuple
from safelight.backends.solvers import give_own_solvers
from safelight.backends.step_thread import StepThread
from safelight.core.components import Components
from safelight.core.config import PipelineConfig
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import PipelineEntry
from safelight.core.request import Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.errors import ModelIndexError, NonFiniteOutputError

FAMILY = "diffusers"
MAX_INPUT_IMAGES = 16
CALLBACK = "callback_on_step_end"
logger = logging.getLogger(__name__)


def has_pipeline(class_name: str) -> bool:
    """Say whether the package has a public pipeline class of this name."""
    import diffusers

    found = getattr(diffusers, class_name, None) if class_name in dir(diffusers) else None
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def pipeline_entry(class_name: str) -> PipelineEntry:
    """Return a registry entry for a public pipeline class of the diffusers package.

    Raises:
        ModelIndexError: if it has no such class.

    """
    params_cls = params_from_signature(_pipeline_class(class_name).__call__, class_name)
    return PipelineEntry(FAMILY, class_name, __name__, (), params_cls, DiffusersConfig, backend=FAMILY)


def describe(model: str, class_name: str, params_cls: type[SamplingParams], notes: tuple[str, ...]) -> ModelSchema:
    """Return what a pipeline takes, as far as its signature says it."""
    options = params_cls.options()
    takes_image, makes_video = "image" in options, "num_frames" in options
    needs_image = issubclass(params_cls, PackageParams) and "image" in params_cls.required
    inputs = f"{'T' if 'prompt' in options else ''}{'I' if takes_image else ''}" or "T"
    task = f"{inputs}2{'V' if makes_video else 'I'}"
    return ModelSchema(
        model=model,
        pipeline_name=class_name,
        task=ModelTaskType(task),
        params_cls=params_cls,
        defaults=params_cls.defaults,
        size_multiple=1,
        num_input_images=(int(needs_image), MAX_INPUT_IMAGES if takes_image else 0),
        notes=notes,
    )


def load(path: Path, schema: ModelSchema, server_args: ServerArgs, variant: str | None) -> ComposedPipeline:
    """Load a pipeline with the package's own loader: local files, safetensors, explicit class, no code of others.

    Args:
        path: the repository, whose index names only classes of diffusers and transformers.
        schema: what the pipeline takes.
        server_args: device and dtypes.
        variant: of the weights, of every component that has it.

    Raises:
        Exception: whatever the package raises.

    """
    cls = _pipeline_class(schema.pipeline_name)
    own = {name: server_args.component_dtype(name) for name in server_args.component_dtypes}
    dtypes = {"default": server_args.component_dtype(""), **own}
    pipe = cls.from_pretrained(path, dtype=dtypes, variant=variant, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    tell_where_images_are(pipe)
    components = Components({"pipeline": pipe.to(server_args.torch_device())})
    return DiffusersPipeline(components, DiffusersConfig(), schema, server_args)


def _pipeline_class(class_name: str) -> Any:
    """Return a pipeline class by its public name."""
    import diffusers

    if not has_pipeline(class_name):
        raise ModelIndexError(f"model_index.json: pipeline class {class_name!r} is none of the diffusers package")
    return getattr(diffusers, class_name)


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(PipelineConfig):
    """Nothing: the conventions are in the package."""

    task: ClassVar[ModelTaskType] = ModelTaskType.T2I
    vae_scale_factor: int = 1
    latent_channels: int = 0
    vae_scale: float | tuple[float, ...] = 1.0
    vae_shift: float | tuple[float, ...] = 0.0


class DiffusersPipeline(ComposedPipeline):
    """A pipeline of the package as one stage."""

    movable: ClassVar[bool] = False

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the one stage."""
        self.add_stage(DiffusersStage(self.get_module("pipeline")), "pipeline")


EntryClass = [DiffusersPipeline]


class DiffusersStage(PipelineStage):
    """The whole call of a pipeline; each of its steps is a unit.

    What the call holds lies in its own thread, and not in the request: such a request cannot be moved.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.parameters = parameters_of(pipe.__call__)

    def run(self, batch: Req, server_args: ServerArgs) -> Steps:
        """Run the call to its end, with a boundary after each step; closing stops it there."""
        thread = StepThread(lambda pause: self._call(batch, pause))
        try:
            while thread.resume():
                yield []
        finally:
            thread.cancel()

    def _call(self, batch: Req, pause: Callable[[], None]) -> None:
        """Call a copy of the pipeline that shares the modules, and has solvers of its own."""
        assert batch.params.seed is not None
        generator = torch.Generator("cpu").manual_seed(batch.params.seed)
        pipe = copy.copy(self.pipe)
        give_own_solvers(pipe, generator)
        pipe.set_progress_bar_config(disable=True)

        def on_step_end(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            batch.step_index, batch.num_inference_steps = step + 1, running.num_timesteps
            pause()
            return tensors

        steps = {CALLBACK: on_step_end} if CALLBACK in self.parameters else {}
        try:
            with torch.inference_mode():
                # By name: as a tuple, some are without their outer list.
                made = pipe(**self._arguments(batch), **steps, generator=generator)
        except Exception as error:  # the package's boundary: what it cannot run is said in its words
            logger.warning("%s failed", type(pipe).__name__, exc_info=True)
            raise refusal(type(pipe).__name__, error) from error
        if any(made.get("nsfw_content_detected") or ()):
            batch.warnings.append("the model's safety checker found a picture to be unsafe, and made it black")
        media = made.to_tuple()[0]
        batch.outputs.extend(to_output(entry, batch.params.output_type) for entry in media)

    def _arguments(self, batch: Req) -> dict[str, Any]:
        """Return the pipeline's arguments in its own words."""
        params = batch.params
        given = {name: value for name, value in params.set_fields().items() if name in self.parameters}
        for name, value in given.items():
            if isinstance(value, tuple) and not takes_tuple(self.parameters[name].annotation):
                single = params.options()[name].kind == "images" and len(value) == 1
                given[name] = value[0] if single else list(value)
        form = "latent" if params.output_type == "latent" else "np"
        return {**given, "output_type": form}


def to_output(media: Any, output_type: str | None) -> Tensor:
    """Return one of a pipeline's outputs, float32 [..., H, W, C] in [0, 1], rounded to uint8 for `pil`.

    Raises:
        NonFiniteOutputError: if it holds NaN or infinity, which some solvers make of some numbers of steps.

    """
    tensor = torch.from_numpy(media) if isinstance(media, np.ndarray) else media.cpu()
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteOutputError("the model made an output that is not finite; no picture is made of it")
    return (tensor * 255).round().to(torch.uint8) if output_type == "pil" else tensor
