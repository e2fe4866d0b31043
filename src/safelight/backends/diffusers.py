"""Any pipeline of the diffusers package, a step at a time: progress, cancel and interleaving as for our own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from safelight.backends.borrowing import POSITIONAL, Handed, borrowed
from safelight.backends.decoding import COMPONENT, METHOD, decode_in_units
from safelight.backends.image_positions import tell_where_images_are
from safelight.backends.refusals import refusal
from safelight.backends.signature import PackageParams, parameters_of, params_from_signature, takes_tuple
from safelight.backends.solvers import Steps
from safelight.backends.step_thread import Ask, StepThread
from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.config import PipelineConfig
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import PipelineEntry
from safelight.core.request import Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage
from safelight.core.stage import Steps as Coroutine
from safelight.core.trees import Tree
from safelight.errors import ModelIndexError, NonFiniteOutputError

if TYPE_CHECKING:
    from safelight.stages.vae import VAE

FAMILY = "diffusers"
MAX_INPUT_IMAGES = 16
STAGES: Mapping[str, str] = {
    "text_encoder": "text_encoding",
    "prompt_enhancer": "text_encoding",
    "image_encoder": "image_encoding",
    "vision_encoder": "image_encoding",
    "vae": "decoding",
    "movq": "decoding",
    "vqvae": "decoding",
    "vqgan": "decoding",
    "vocoder": "decoding",
    "safety_checker": "safety_checking",
}
"""By how a component's name begins, what users see of its calls; all else is denoising."""
DENOISING = "denoising"
HANDED = "handed"
"""Static argument of a call: how the package made it."""
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


def load(
    path: Path,
    class_name: str,
    server_args: ServerArgs,
    variant: str | None,
    networks: Mapping[str, nn.Module] | None = None,
) -> Any:
    """Load a pipeline with the package's own loader: local files, safetensors, explicit class, no code of others.

    Args:
        path: the repository, whose index names only classes of diffusers and transformers.
        class_name: of the pipeline.
        server_args: dtypes.
        variant: of the weights, of every component that has it.
        networks: components that there are already; of these no weights are read.

    Returns:
        The package's pipeline, on the CPU.

    Raises:
        Exception: whatever the package raises.

    """
    cls = _pipeline_class(class_name)
    own = {name: server_args.component_dtype(name) for name in server_args.component_dtypes}
    dtypes = {"default": server_args.component_dtype(""), **own}
    given = dict(networks or {})
    pipe = cls.from_pretrained(
        path, dtype=dtypes, variant=variant, use_safetensors=True, local_files_only=True, **given
    )
    pipe.set_progress_bar_config(disable=True)
    tell_where_images_are(pipe)
    return pipe


def assemble(components: Components, schema: ModelSchema, server_args: ServerArgs) -> DiffusersPipeline:
    """Return a loaded pipeline of the package as the engine runs it.

    Args:
        components: the package's pipeline, as `pipeline`, and its networks.
        schema: what it takes.
        server_args: the settings.

    """
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
    """A pipeline of the package: one stage, which yields each call of its networks."""

    movable: ClassVar[bool] = False
    native: ClassVar[bool] = False

    def __init__(
        self, components: Components, config: PipelineConfig, schema: ModelSchema, server_args: ServerArgs
    ) -> None:
        super().__init__(components, config, schema, server_args)
        self.alternates = alternates_among(self.denoisers())

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the networks that steps run: all that neither encode nor decode."""
        return {name: module for name, module in self.modules().items() if _stage_of_component(name) == DENOISING}

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the one stage."""
        self.call_stage = DiffusersStage(self.get_module("pipeline"), self.device, self.components.vae)
        self.add_stage(self.call_stage, "pipeline")

    def forward(self, call: ModelCall) -> Tree:
        """Make a call as the package would: of the network's part and method that it names, in its caches' context.

        Raises:
            Exception: what the network raises, as `refusal` has it.

        """
        if HANDED not in call.static:  # some units of what the package takes for one call
            return super().forward(call)
        handed: Any = call.static[HANDED]
        module = self.get_module(call.component) if handed.own is None else handed.own
        arguments = dict(call.kwargs)
        args = arguments.pop(POSITIONAL, ())
        path, _, method = call.method.rpartition(".")
        part = module.get_submodule(path)
        made = part if method == "forward" else getattr(part, method)
        context = handed.context
        try:
            with nullcontext() if context is None else module.cache_context(context[0], **dict(context[1:])):
                return made(*args, **arguments)
        except Exception as error:  # the package's boundary, as around the rest of its call
            raise refused(self.schema.pipeline_name, error) from error


EntryClass = [DiffusersPipeline]


class DiffusersStage(PipelineStage):
    """The whole call of a pipeline; each call of its networks is a unit.

    What the call holds lies in its own thread, and not in the request: such a request cannot be moved.
    """

    def __init__(self, pipe: Any, device: torch.device, vae: VAE | None = None) -> None:
        self.pipe = pipe
        self.device = device
        self.vae = vae
        self.parameters = parameters_of(pipe.__call__)

    def run(self, batch: Req, server_args: ServerArgs) -> Coroutine:
        """Run the call to its end, and yield each call that its networks make; closing stops it there."""
        thread = StepThread(lambda ask: self.call(batch, ask))
        try:
            call = thread.resume()
            while call is not None:
                batch.stage = stage_of(call)
                call = thread.resume((yield [call])[0])
        finally:
            thread.cancel()

    def call(self, batch: Req, ask: Ask) -> None:
        """Call a copy of the pipeline that shares the weights, and has solvers of its own.

        Args:
            batch: the request.
            ask: has a `ModelCall` made, and returns its result.

        """
        assert batch.params.seed is not None
        generator = torch.Generator("cpu").manual_seed(batch.params.seed)
        ordinal = 0

        def tell(done: int, in_all: int) -> None:
            nonlocal ordinal
            batch.step_index, batch.num_inference_steps, ordinal = done, in_all, 0

        def hand(handed: Handed) -> Any:
            component, method = handed.component, handed.method

            def make(kwargs: dict[str, Any], static: dict[str, Any]) -> Any:
                nonlocal ordinal
                branch = str(ordinal) if handed.context is None else handed.context[0]
                ordinal += 1
                key = batch.key(branch, batch.step_index)
                return ask(ModelCall(component, kwargs, {}, None, key, static, method, batch.model))

            if self.vae is not None and (component, method, handed.own) == (COMPONENT, METHOD, None):
                return decode_in_units(self.vae, handed.arguments, make)
            return make(handed.arguments, {HANDED: handed})

        pipe = borrowed(self.pipe, hand, Steps(generator, tell), self.device)
        try:
            with torch.inference_mode():
                # By name: as a tuple, some are without their outer list.
                made = pipe(**self._arguments(batch), generator=generator)
        except Exception as error:  # the package's boundary: what it cannot run is said in its words
            raise refused(type(pipe).__name__, error) from error
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


def refused(pipeline_name: str, error: Exception) -> Exception:
    """Log what a pipeline's call raised, and return what it is to whoever asked."""
    logger.warning("%s failed", pipeline_name, exc_info=error)
    return refusal(pipeline_name, error)


def stage_of(call: ModelCall) -> str:
    """Return the name under which users see the work of a call."""
    stage = _stage_of_component(call.component)
    return "image_vae_encoding" if stage == "decoding" and "encode" in call.method else stage


def _stage_of_component(component: str) -> str:
    name = component.rpartition(".")[2]
    return next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), DENOISING)


def alternates_among(networks: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the networks of which a step needs one: those of one class whose names differ in a number at their end."""
    kinds: dict[tuple[type, str], list[str]] = {}
    for name, module in networks.items():
        kinds.setdefault((type(module), name.rstrip("_0123456789")), []).append(name)
    return next((tuple(names) for names in kinds.values() if len(names) > 1), ())


def to_output(media: Any, output_type: str | None) -> Tensor:
    """Return one of a pipeline's outputs, float32 [..., H, W, C] in [0, 1], rounded to uint8 for `pil`.

    Raises:
        NonFiniteOutputError: if it holds NaN or infinity, which some solvers make of some numbers of steps.

    """
    tensor = torch.from_numpy(media) if isinstance(media, np.ndarray) else media.cpu()
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteOutputError("the model made an output that is not finite; no picture is made of it")
    return (tensor * 255).round().to(torch.uint8) if output_type == "pil" else tensor
