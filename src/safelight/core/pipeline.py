"""`ComposedPipeline`: a list of stages over a model's components, run as one coroutine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.config import PipelineConfig
from safelight.core.request import CallMaker, ModelCall, Prediction, Req
from safelight.core.residency import Residency
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.core.stage_memory import StageMemory
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.decoding import DecodingStage
from safelight.stages.denoising import DenoisingStage
from safelight.stages.dmd_denoising import DmdDenoisingStage
from safelight.stages.image_encoding import ImageEncodingStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.input_validation import InputValidationStage
from safelight.stages.latent_preparation import LatentPreparationStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage


class ComposedPipeline:
    """A model's stages, in order, over its components. It holds nothing of any request.

    A family subclasses it, names its components, and adds its stages in `create_pipeline_stages`.

    Attributes:
        stages: by name, in order.
        shared_stages: names of those in which several ranks wait for each other, model calls aside.
        run_calls: makes the calls of a step, given how one is made; over several ranks, where a step is shared.
        shares_branches: whether the guidance branches of a step run on different ranks.
        empty_components: by name, what makes a component without weights, on the meta device, where that is known.
        count_memory: counts what each stage takes beside weights; of a pipeline that cannot be counted, nothing.

    """

    pipeline_name: ClassVar[str]
    """`_class_name` in `model_index.json`."""
    component_classes: ClassVar[Mapping[str, str]] = {}
    """The family's own components: class name in `model_index.json` to `module:Class`."""
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By component, submodules that this pipeline never runs: a repository may leave their weights out."""
    image_vae_encoding_stage: ClassVar[type[ImageVAEEncodingStage]] = ImageVAEEncodingStage
    decoding_stage: ClassVar[type[DecodingStage]] = DecodingStage
    """The stages that run the VAE, which a model with another kind of VAE sets."""
    alternates: ClassVar[tuple[str, ...]] = ()
    """Components of which a step needs one: the others can wait on the host."""
    movable: ClassVar[bool] = True
    """Whether `move` can take a request of this pipeline to the host and back."""
    _required_config_modules: ClassVar[tuple[str, ...]] = ()
    _optional_config_modules: ClassVar[tuple[str, ...]] = ()
    """Components that may be null in the index, or absent."""

    def __init__(
        self, modules: Mapping[str, Any], config: PipelineConfig, schema: ModelSchema, server_args: ServerArgs
    ) -> None:
        self.config = config
        self.schema = schema
        self.server_args = server_args
        self.device = server_args.torch_device()
        self.stages: dict[str, PipelineStage] = {}
        self.shared_stages: frozenset[str] = frozenset()
        self.shares_branches = False
        self.empty_components: dict[str, Callable[[], nn.Module]] = {}
        self.count_memory: Callable[[], tuple[StageMemory, ...]] = tuple
        self.run_calls: Callable[[Sequence[ModelCall], CallMaker], list[Prediction]] = run_in_turn
        self._modules = dict(modules)
        self.create_pipeline_stages(server_args)
        home = None if server_args.offload == "none" else torch.device("cpu")
        self.conditioning_cache = ConditioningCache(server_args.conditioning_cache_bytes(), home)
        for stage in self.stages.values():
            for each in (stage, *stage.parts()):
                each.cache = self.conditioning_cache
        self.residency = Residency(self._modules, {}, {})

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """Return the names of the components that are loaded."""
        return cls._required_config_modules + cls._optional_config_modules

    @classmethod
    def is_optional(cls, component: str) -> bool:
        """Say whether the model runs without this component."""
        return component in cls._optional_config_modules

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the stages, in the order in which they run."""
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        """Return the components that are modules, by their names in `model_index.json`."""
        return {name: module for name, module in self._modules.items() if isinstance(module, nn.Module)}

    def add_stage(self, stage: PipelineStage, stage_name: str | None = None) -> None:
        """Add a stage at the end, by the name under which users see it (its class's name unless given)."""
        name = stage_name or type(stage).__name__
        assert name not in self.stages, f"two stages are named {name}"
        self.stages[name] = stage

    def get_module(self, name: str) -> Any:
        """Return a component by its name in `model_index.json`."""
        return self._modules[name]

    def stage_components(self, batch: Req) -> tuple[str, ...]:
        """Return the names of the components that the request's stage runs itself in the next unit."""
        needed = self.stages[batch.stage].needed_modules(batch) if batch.stage else ()
        return self.residency.owners(needed)

    def needed_components(self, batch: Req) -> tuple[str, ...]:
        """Return the names of all components that the request's next unit runs: the stage's, and those of its calls."""
        called = dict.fromkeys(call.component for call in batch.pending)
        return (*called, *self.stage_components(batch))

    def run(self, batch: Req) -> Steps:
        """Run every stage on a request, with a boundary before each."""
        for name, stage in self.stages.items():
            batch.stage = name
            yield []
            yield from stage.run(batch, self.server_args)

    def add_standard_t2i_stages(self) -> None:
        """Text to image: encode the text, lay out the noise, denoise, decode."""
        self._add_input_stages()
        self._add_loop_stages()
        self.add_standard_decoding_stage()

    def add_standard_ti2i_stages(self) -> None:
        """Text and images to image: as text to image, with the input images' latents."""
        self._add_input_stages()
        self._add_image_stages()
        self._add_loop_stages()
        self.add_standard_decoding_stage()

    def add_standard_ti2v_stages(self) -> None:
        """Text and images to video; without images, text to video."""
        self.add_standard_ti2i_stages()

    def add_standard_dmd_stages(self) -> None:
        """Text to picture or video, in the few steps that the model was distilled to."""
        self._add_input_stages()
        self._add_loop_stages(DmdDenoisingStage(self.config))
        self.add_standard_decoding_stage()

    def add_standard_decoding_stage(self) -> None:
        """Latents to pixels."""
        self.add_stage(self.decoding_stage(self.get_module("vae"), self.config), "decoding")

    def _add_input_stages(self) -> None:
        names = [name for name in self.component_names() if name.startswith("text_encoder")]
        encoders = [self.get_module(name) for name in names]
        tokenizers = [self.get_module(name.replace("text_encoder", "tokenizer")) for name in names]
        self.add_stage(InputValidationStage(self.config), "input_validation")
        processor = self._modules.get("processor")
        self.add_stage(TextEncodingStage(encoders, tokenizers, processor, self.config), "text_encoding")

    def _add_image_stages(self) -> None:
        if "image_encoder" in self._modules:
            encoder, processor = self.get_module("image_encoder"), self.get_module("image_processor")
            self.add_stage(ImageEncodingStage(encoder, processor, self.config), "image_encoding")
        self.add_stage(self.image_vae_encoding_stage(self.get_module("vae"), self.config), "image_vae_encoding")

    def _add_loop_stages(self, loop: DenoisingStage | None = None) -> None:
        self.add_stage(TimestepPreparationStage(self.get_module("scheduler"), self.config), "timestep_preparation")
        self.add_stage(LatentPreparationStage(self.config), "latent_preparation")
        self.add_stage(ConditioningStage(self.config), "conditioning")
        self.add_stage(loop or DenoisingStage(self.config), "denoising")


def run_in_turn(calls: Sequence[ModelCall], make: CallMaker) -> list[Prediction]:
    """Make the calls of a step one after another."""
    return [make(call) for call in calls]
