"""`ComposedPipeline`: a list of stages over a model's components, run as one coroutine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from safelight.core.calls import ModelCall
from safelight.core.components import Components, Methods
from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.config import PipelineConfig
from safelight.core.request import Req
from safelight.core.residency import Residency
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.core.stage import PipelineStage, Steps
from safelight.core.trees import Tree
from safelight.stages.conditioning import ConditioningStage
from safelight.stages.decoding import DecodingStage
from safelight.stages.denoising import DenoisingStage
from safelight.stages.dmd_denoising import DmdDenoisingStage
from safelight.stages.encoders import ENCODER_METHODS
from safelight.stages.image_encoding import ImageEncodingStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage
from safelight.stages.input_validation import InputValidationStage
from safelight.stages.latent_preparation import LatentPreparationStage
from safelight.stages.text_encoding import TextEncodingStage
from safelight.stages.timestep_preparation import TimestepPreparationStage
from safelight.stages.vae import VAE, whole

if TYPE_CHECKING:
    from safelight.core.model_runner import Wrapper


class ComposedPipeline:
    """A model's stages, in order, over its components. It holds nothing of any request.

    A family subclasses it, names its components, and adds its stages in `create_pipeline_stages`.

    Attributes:
        components: what was loaded, and how it is run.
        vae: how the VAE is run; None without one.
        methods: by component, what model calls may name beside `forward`.
        stages: by name, in order.

    """

    pipeline_name: ClassVar[str]
    """`_class_name` in `model_index.json`."""
    component_classes: ClassVar[Mapping[str, str]] = {}
    """The family's own components: class name in `model_index.json` to `module:Class`."""
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By component, submodules that this pipeline never runs: a repository may leave their weights out."""
    component_methods: ClassVar[Mapping[str, Methods]] = {}
    """By component, what model calls may name beside `forward`, where it is not what the standard stages name."""
    alternates: tuple[str, ...] = ()
    """Components of which a step needs one: the others can wait on the host."""
    native: ClassVar[bool] = True
    """Whether loop and networks are ours: all calls of a step come at once, and the blocks of a list are alike."""
    movable: ClassVar[bool] = True
    """Whether `move` can take a request of this pipeline to the host and back."""
    _required_config_modules: ClassVar[tuple[str, ...]] = ()
    _optional_config_modules: ClassVar[tuple[str, ...]] = ()
    """Components that may be null in the index, or absent."""

    def __init__(
        self, components: Components, config: PipelineConfig, schema: ModelSchema, server_args: ServerArgs
    ) -> None:
        self.config = config
        self.schema = schema
        self.server_args = server_args
        self.device = server_args.torch_device()
        modules = components.modules
        self.vae = components.vae or (whole(modules["vae"]) if "vae" in modules else None)
        self.components = components
        self.methods = {**standard_methods(modules, self.vae), **self.component_methods}
        self.residency = components.residency or Residency({}, {})
        self.stages: dict[str, PipelineStage] = {}
        self.create_pipeline_stages(server_args)
        home = None if server_args.offload == "none" else torch.device("cpu")
        self.conditioning_cache = ConditioningCache(
            server_args.conditioning_cache_bytes(), components.weights, home=home
        )
        for stage in self.stages.values():
            for each in (stage, *stage.parts()):
                each.cache = self.conditioning_cache

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
        return {name: module for name, module in self.components.modules.items() if isinstance(module, nn.Module)}

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the components that steps run, of which blocks may be compiled: those of the family's own classes."""
        own = set(self.component_classes.values())
        return {
            name: module
            for name, module in self.modules().items()
            if f"{type(module).__module__}:{type(module).__qualname__}" in own
        }

    def add_stage(self, stage: PipelineStage, stage_name: str | None = None) -> None:
        """Add a stage at the end, by the name under which users see it (its class's name unless given)."""
        name = stage_name or type(stage).__name__
        assert name not in self.stages, f"two stages are named {name}"
        self.stages[name] = stage

    def get_module(self, name: str) -> Any:
        """Return a component by its name in `model_index.json`."""
        return self.components.modules[name]

    def forward(self, call: ModelCall) -> Tree:
        """Run what a call names, here and now: whoever makes it has the component on the device."""
        component, arguments = self.get_module(call.component), {**call.kwargs, **call.shared_kwargs, **call.static}
        if call.method == "forward":
            return component(**arguments)
        return self.methods[call.component][call.method](component, **arguments)

    def wrappers(self, stacked: bool) -> tuple[Wrapper, ...]:
        """Return what happens to this model's calls before all that happens to any model's.

        Args:
            stacked: whether calls of several requests are made as one.

        """
        return ()

    def get_scheduler(self) -> Any:
        """Return the solver that each request has a copy of."""
        return self.get_module("scheduler")

    def run(self, batch: Req) -> Steps:
        """Run every stage on a request, with a boundary before each."""
        for name, stage in self.stages.items():
            batch.stage = name
            yield []
            yield from stage.run(batch, self.server_args)
            batch.stage_state = None

    def add_standard_t2i_stages(self) -> None:
        """Text to image: encode the text, lay out the noise, denoise, decode."""
        self._add_stages(DenoisingStage(self.config))

    def add_standard_ti2i_stages(self) -> None:
        """Text and images to image: as text to image, with the input images' latents."""
        self._add_stages(DenoisingStage(self.config), takes_images=True)

    def add_standard_ti2v_stages(self) -> None:
        """Text and images to video; without images, text to video."""
        self.add_standard_ti2i_stages()

    def add_standard_dmd_stages(self) -> None:
        """Text to picture or video, in the few steps that the model was distilled to."""
        self._add_stages(DmdDenoisingStage(self.config))

    def add_standard_decoding_stage(self) -> None:
        """Latents to pixels."""
        assert self.vae is not None, f"{self.pipeline_name} has no VAE"
        self.add_stage(DecodingStage(self.vae, self.config), "decoding")

    def _add_stages(self, loop: DenoisingStage, takes_images: bool = False) -> None:
        config, modules = self.config, self.components.modules
        encoders = [name for name in self.component_names() if name.startswith("text_encoder")]
        tokenizers = [modules[name.replace("text_encoder", "tokenizer")] for name in encoders]
        self.add_stage(InputValidationStage(config), "input_validation")
        self.add_stage(TextEncodingStage(tokenizers, modules.get("processor"), config), "text_encoding")
        if takes_images and "image_encoder" in modules:
            self.add_stage(ImageEncodingStage(modules["image_processor"], config), "image_encoding")
        if takes_images:
            assert self.vae is not None, f"{self.pipeline_name} has no VAE"
            self.add_stage(ImageVAEEncodingStage(self.vae, config), "image_vae_encoding")
        self.add_stage(TimestepPreparationStage(self.get_scheduler(), config), "timestep_preparation")
        self.add_stage(LatentPreparationStage(config), "latent_preparation")
        self.add_stage(ConditioningStage(config), "conditioning")
        self.add_stage(loop, "denoising")
        self.add_standard_decoding_stage()


def standard_methods(modules: Mapping[str, Any], vae: VAE | None) -> dict[str, Methods]:
    """Return what the standard stages name of components beside `forward`."""
    kinds = {name: name.rstrip("_0123456789") for name in modules}
    found = {name: ENCODER_METHODS[kind] for name, kind in kinds.items() if kind in ENCODER_METHODS}
    if vae is not None:
        found["vae"] = {
            "encode": lambda _, **given: vae.encoded(**given),
            "decode": lambda _, **given: vae.decoded(**given),
        }
    return found
