"""Any pipeline of the diffusers package, a step at a time: progress, cancel and interleaving as for our own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from safelight.backends.attention import set_attention_backend, torchs_own_attention
from safelight.backends.borrowing import POSITIONAL, Handed, borrowed, names_of_networks
from safelight.backends.encoder_cache import EncoderCache
from safelight.backends.image_positions import tell_where_images_are
from safelight.backends.refusals import refusal
from safelight.backends.signature import PackageParams, parameters_of, params_from_signature, takes_tuple
from safelight.backends.solvers import Steps
from safelight.backends.stacking import TRIAL, ProvenStacking, Records, TreeSignature
from safelight.backends.step_thread import Ask, StepThread
from safelight.backends.trees import InFloat32, aligned
from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.config import PipelineConfig
from safelight.core.model_runner import Wrapper
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
"""By how a component's name, or a word of it, begins, what users see of its calls; all else is denoising."""
ENCODING = ("text_encoding", "image_encoding", "image_vae_encoding")
"""Stages whose calls give the same of the same: other requests may want it too."""
CONTEXT, OWN = "context", "own"
"""Static arguments of a call: the context of caches in which it is made, and the request's own network, where it has
one."""
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
    path: Path, schema: ModelSchema, server_args: ServerArgs, variant: str | None, weights: Mapping[str, str]
) -> ComposedPipeline:
    """Load a pipeline with the package's own loader: local files, safetensors, explicit class, no code of others.

    Args:
        path: the repository, whose index names only classes of diffusers and transformers.
        schema: what the pipeline takes.
        server_args: device and dtypes.
        variant: of the weights, of every component that has it.
        weights: digest of each component's weights.

    Raises:
        Exception: whatever the package raises.

    """
    cls = _pipeline_class(schema.pipeline_name)
    own = {name: server_args.component_dtype(name) for name in server_args.component_dtypes}
    dtypes = {"default": server_args.component_dtype(""), **own}
    pipe = cls.from_pretrained(path, dtype=dtypes, variant=variant, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    tell_where_images_are(pipe)
    pipe.to(server_args.torch_device())
    networks = names_of_networks(pipe)
    set_attention_backend(networks, server_args.attention_backend, server_args.torch_device())
    components = Components({"pipeline": pipe, **networks}, weights=weights)
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

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the one stage."""
        self.add_stage(DiffusersStage(self.get_module("pipeline"), self.device), "pipeline")

    def wrappers(self, stacked: bool) -> tuple[Wrapper, ...]:
        """Return what answers encoders' calls that were made before, and what stacks those that were proven."""
        import transformers

        modules = self.modules()
        training = {name for name, module in modules.items() if any(part.training for part in module.modules())}
        known = frozenset(name for name, each in modules.items() if isinstance(each, transformers.PreTrainedModel))
        remembered = EncoderCache(self.conditioning_cache, functools.partial(encodes, known), training)
        return (remembered, ProvenStacking(self.device)) if stacked else (remembered,)

    def forward(self, call: ModelCall) -> Tree:
        """Make a call as the package would: of the network's part and method that it names, in its caches' context.

        Raises:
            Exception: what the network raises, as `refusal` has it.

        """
        own, context = call.static[OWN], cast("tuple[Any, ...] | None", call.static[CONTEXT])
        module: Any = self.get_module(call.component) if own is None else own
        arguments = dict(call.kwargs)
        args = arguments.pop(POSITIONAL, ())
        path, _, method = call.method.rpartition(".")
        part = module.get_submodule(path)
        made = part if method == "forward" else getattr(part, method)
        try:
            with (
                in_float32(module) if call.static.get(TRIAL) == "float32" else nullcontext(),
                nullcontext() if context is None else module.cache_context(context[0], **dict(context[1:])),
            ):
                return made(*args, **arguments)
        except Exception as error:  # the package's boundary, as around the rest of its call
            if TRIAL in call.static:
                raise
            raise refused(self.schema.pipeline_name, error) from error


EntryClass = [DiffusersPipeline]


class DiffusersStage(PipelineStage):
    """The whole call of a pipeline; each call of its networks is a unit.

    What the call holds lies in its own thread, and not in the request: such a request cannot be moved.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe = pipe
        self.device = device
        self.parameters = parameters_of(pipe.__call__)
        self.records = Records()

    def run(self, batch: Req, server_args: ServerArgs) -> Coroutine:
        """Run the call to its end, and yield each call that its networks make; closing stops it there."""
        thread = StepThread(lambda ask: self._call(batch, ask))
        try:
            call = thread.resume()
            while call is not None:
                batch.stage = stage_of(call.component, call.method)
                call = thread.resume((yield [call])[0])
        finally:
            thread.cancel()

    def _call(self, batch: Req, ask: Ask) -> None:
        """Call a copy of the pipeline that shares the weights, and has solvers of its own."""
        assert batch.params.seed is not None
        generator = torch.Generator("cpu").manual_seed(batch.params.seed)
        ordinal = 0

        def tell(done: int, in_all: int) -> None:
            nonlocal ordinal
            batch.step_index, batch.num_inference_steps, ordinal = done, in_all, 0

        def hand(handed: Handed) -> Any:
            nonlocal ordinal
            branch = str(ordinal) if handed.context is None else handed.context[0]
            ordinal += 1
            key = batch.key(branch, batch.step_index)
            static = {CONTEXT: handed.context, OWN: handed.own}
            component, method, arguments = handed.component, handed.method, handed.arguments
            if stage_of(component, method) == "denoising":
                signature = (TreeSignature((component, method), arguments, self.records),)
                return ask(ModelCall(component, arguments, {}, signature, key, static, method, batch.model))
            return ask(ModelCall(component, aligned(arguments), {}, None, key, static, method, batch.model))

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


@functools.cache
def stage_of(component: str, method: str) -> str:
    """Return the name under which users see the work of a call of a component's method."""
    name = f"_{component.rpartition('.')[2]}"
    stage = next((stage for words, stage in STAGES.items() if f"_{words}" in name), "denoising")
    return "image_vae_encoding" if stage == "decoding" and "encode" in method else stage


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Have a network compute in float32, whatever its weights are."""
    with torchs_own_attention(module), InFloat32():
        yield


def encodes(known: Collection[str], call: ModelCall) -> bool:
    """Say whether a call is of an encoder, of text or images: by its name, or because its component is known as one."""
    stage = stage_of(call.component, call.method)
    return stage in ENCODING or (stage == "denoising" and call.component in known)


def to_output(media: Any, output_type: str | None) -> Tensor:
    """Return one of a pipeline's outputs, float32 [..., H, W, C] in [0, 1], rounded to uint8 for `pil`.

    Raises:
        NonFiniteOutputError: if it holds NaN or infinity, which some solvers make of some numbers of steps.

    """
    tensor = torch.from_numpy(media) if isinstance(media, np.ndarray) else media.cpu()
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteOutputError("the model made an output that is not finite; no picture is made of it")
    return (tensor * 255).round().to(torch.uint8) if output_type == "pil" else tensor
