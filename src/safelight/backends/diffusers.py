"""Any pipeline of the diffusers package, a step at a time: progress, cancel and interleaving as for our own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from PIL import Image, ImageOps
from torch import nn

from safelight.backends.annotations import Askable
from safelight.backends.attention import torchs_own_attention
from safelight.backends.borrowing import POSITIONAL, Handed, borrowed
from safelight.backends.decoding import COMPONENT, METHOD, decode_in_units
from safelight.backends.demands import demands_of
from safelight.backends.encoder_cache import EncoderCache
from safelight.backends.image_positions import tell_where_images_are
from safelight.backends.outputs import SOUND, UNSAFE, VIDEO, made_by, media_of
from safelight.backends.refusals import refusal
from safelight.backends.signature import sorted_arguments
from safelight.backends.solvers import Steps
from safelight.backends.stacking import TRIAL, ProvenStacking, Records, TreeSignature
from safelight.backends.step_thread import Ask, StepThread
from safelight.backends.tasks import over_the_same, params_of
from safelight.backends.trees import InFloat32, aligned
from safelight.clips import EncodedClip
from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.config import PipelineConfig
from safelight.core.model_runner import Wrapper
from safelight.core.options import MEDIA_KINDS, without_null
from safelight.core.package_params import PackageParams
from safelight.core.params import SamplingParams
from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import PipelineEntry
from safelight.core.request import Req
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.server_args import ServerArgs
from safelight.core.solver import Traits, solver_by_name
from safelight.core.stage import PipelineStage
from safelight.core.stage import Steps as Coroutine
from safelight.core.tasks import MASK, MASK_IMAGE
from safelight.core.trees import Tree
from safelight.errors import ModelIndexError

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
"""By how a component's name, or a word of it, begins, what users see of its calls; all else is denoising."""
DENOISING = "denoising"
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


def pipeline_entry(class_name: str, components: Collection[str] = ()) -> PipelineEntry:
    """Return a registry entry for a public pipeline class of the diffusers package.

    Args:
        class_name: of the pipeline.
        components: names of those that a model has, for what else may be done with them.

    Raises:
        ModelIndexError: if it has no such class.

    """
    _pipeline_class(class_name)  # which says that there is none
    params_cls = params_of(class_name, components)
    return PipelineEntry(FAMILY, class_name, __name__, (), params_cls, DiffusersConfig, backend=FAMILY)


def takes_solver(class_name: str, own: Any, solver: Any) -> Traits | None:
    """Return which lists of a schedule a solver takes in a pipeline of the package; None where it does not fit.

    Args:
        class_name: the pipeline's.
        own: the solver that it was loaded with.
        solver: another; both have a schedule.

    """
    return demands_of(_pipeline_class(class_name)).traits(own, solver)


def describe(model: str, class_name: str, params_cls: type[SamplingParams], notes: tuple[str, ...]) -> ModelSchema:
    """Return what a pipeline takes, as far as its signature says it."""
    options = params_cls.options()
    inputs = "T" if "prompt" in options else ""
    if any(option.kind in MEDIA_KINDS for option in options.values()):
        inputs += "I" if "image" in options or not any(option.kind == "clip" for option in options.values()) else "V"
    letter = {VIDEO: "V", SOUND: "A"}.get(made_by(_pipeline_class(class_name).__call__, class_name), "I")
    needs_image = issubclass(params_cls, PackageParams) and all("image" in task.needs for task in params_cls.tasks)
    return ModelSchema(
        model=model,
        pipeline_name=class_name,
        task=ModelTaskType(f"{inputs or 'T'}2{letter}"),
        params_cls=params_cls,
        defaults=params_cls.defaults,
        size_multiple=1,
        num_input_images=(int(needs_image), MAX_INPUT_IMAGES if "image" in options else 0),
        notes=notes,
    )


def load(
    path: Path,
    class_name: str,
    server_args: ServerArgs,
    variant: str | None,
    given: Mapping[str, Any],
) -> Any:
    """Load a pipeline with the package's own loader: local files, safetensors, explicit class, no code of others.

    Args:
        path: the repository, whose index names only classes of diffusers and transformers.
        class_name: of the pipeline.
        server_args: dtypes.
        variant: of the weights, of every component that has it.
        given: components that there are already; of these nothing is read.

    Returns:
        The package's pipeline, on the CPU.

    Raises:
        Exception: whatever the package raises.

    """
    cls = _pipeline_class(class_name)
    own = {name: server_args.component_dtype(name) for name in server_args.component_dtypes}
    dtypes = {"default": server_args.component_dtype(""), **own}
    pipe = unconnected(cls).from_pretrained(
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


def unconnected(cls: Any) -> Any:
    """Return a pipeline class that loads what its index names alone, and nothing that a README names."""
    if not cls._load_connected_pipes:
        return cls
    return type(cls.__name__, (cls,), {"_load_connected_pipes": False, "__module__": cls.__module__})


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
        return {name: module for name, module in self.modules().items() if stage_of(name) == DENOISING}

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the one stage, which has a pipeline of each task over the same components."""
        pipe, params_cls = self.get_module("pipeline"), self.schema.params_cls
        assert issubclass(params_cls, PackageParams)
        pipes = {name: over_the_same(pipe, name) for name in (task.pipeline_name for task in params_cls.tasks[1:])}
        pipes = {self.schema.pipeline_name: pipe, **pipes}
        self.call_stage = DiffusersStage(pipes, self.device, self.components.vae)
        self.add_stage(self.call_stage, "pipeline")

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
        if OWN not in call.static:  # some units of what the package takes for one call
            return super().forward(call)
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

    def __init__(self, pipes: Mapping[str, Any], device: torch.device, vae: VAE | None = None) -> None:
        self.pipes = pipes
        self.device = device
        self.vae = vae
        self.askable = {name: sorted_arguments(pipe.__call__)[0] for name, pipe in pipes.items()}
        self.records = Records()

    def run(self, batch: Req, server_args: ServerArgs) -> Coroutine:
        """Run the call to its end, and yield each call that its networks make; closing stops it there."""
        thread = StepThread(lambda ask: self.call(batch, ask))
        try:
            call = thread.resume()
            while call is not None:
                batch.stage = stage_of(call.component, call.method)
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

            def make(arguments: dict[str, Any], static: dict[str, Any], signature: Any = None) -> Any:
                nonlocal ordinal
                branch = str(ordinal) if handed.context is None else handed.context[0]
                ordinal += 1
                key = batch.key(branch, batch.step_index)
                return ask(ModelCall(component, arguments, {}, signature, key, static, method, batch.model))

            if self.vae is not None and (component, method, handed.own) == (COMPONENT, METHOD, None):
                return decode_in_units(self.vae, handed.arguments, make)
            static = {CONTEXT: handed.context, OWN: handed.own}
            if stage_of(component, method) == DENOISING:
                signature = (TreeSignature((component, method), handed.arguments, self.records),)
                return make(handed.arguments, static, signature)
            return make(aligned(handed.arguments), static)

        task = batch.params.task_of(batch.params.set_fields())
        assert task is not None
        name, solver_name = task.pipeline_name, batch.params.scheduler
        shared = self.pipes[name]
        solver = None if solver_name is None else solver_by_name(solver_name, shared.scheduler)
        pipe = borrowed(shared, hand, Steps(generator, tell), self.device, solver)
        try:
            with torch.inference_mode():
                # By name: as a tuple, some are without their outer list.
                made = pipe(**arguments(batch.params, self.askable[name]), generator=generator)
        except Exception as error:  # the package's boundary: what it cannot run is said in its words
            raise refused(type(pipe).__name__, error) from error
        if any(any(made.get(name) or ()) for name in UNSAFE):
            batch.warnings.append("the model's safety checker found a picture to be unsafe, and made it black")
        batch.outputs.extend(media_of(made, pipe, batch.params.output_type))


def arguments(params: SamplingParams, askable: Mapping[str, Askable]) -> dict[str, Any]:
    """Return what a request asks for in the words of a pipeline's call, by how its parameters are asked for."""
    given = without_null(params.set_fields())
    made = {name: known.makes(_in_python(given[name])) for name, known in askable.items() if name in given}
    if MASK_IMAGE in askable and given.get(MASK) is not None:
        made[MASK_IMAGE] = repainted_where_transparent(given[MASK])
    return {**made, "output_type": "latent" if params.output_type == "latent" else "np"}


def repainted_where_transparent(mask: Image.Image) -> Image.Image:
    """Return an RGBA mask as the package has masks, in grey: white where it is transparent."""
    return ImageOps.invert(mask.getchannel("A"))


def _in_python(value: Any) -> Any:
    """Return a checked value with its clips decoded."""
    return value.frames() if isinstance(value, EncodedClip) else value


def refused(pipeline_name: str, error: Exception) -> Exception:
    """Log what a pipeline's call raised, and return what it is to whoever asked."""
    logger.warning("%s failed", pipeline_name, exc_info=error)
    return refusal(pipeline_name, error)


@functools.cache
def stage_of(component: str, method: str = "forward") -> str:
    """Return the name under which users see the work of a call of a component's method."""
    name = f"_{component.rpartition('.')[2]}"
    stage = next((stage for words, stage in STAGES.items() if f"_{words}" in name), DENOISING)
    return "image_vae_encoding" if stage == "decoding" and "encode" in method else stage


def alternates_among(networks: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the networks of which a step needs one: those of one class whose names differ in a number at their end."""
    kinds: dict[tuple[type, str], list[str]] = {}
    for name, module in networks.items():
        kinds.setdefault((type(module), name.rstrip("_0123456789")), []).append(name)
    return next((tuple(names) for names in kinds.values() if len(names) > 1), ())


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Have a network compute in float32, whatever its weights are."""
    with torchs_own_attention(module), InFloat32():
        yield


def encodes(known: Collection[str], call: ModelCall) -> bool:
    """Say whether a call is of an encoder, of text or images: by its name, or because its component is known as one."""
    stage = stage_of(call.component, call.method)
    return stage in ENCODING or (stage == DENOISING and call.component in known)
