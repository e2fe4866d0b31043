"""The toy pipelines, one in each style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs
from safelight.stages.denoising import DenoisingStage
from safelight.stages.input_validation import InputValidationStage
from toy_models.config import ToyVariationPipelineConfig
from toy_models.stages import ToyBeforeDenoisingStage


class ToyPipeline(ComposedPipeline):
    """Text to image, in the modular style: the standard stages, steered by the config's callbacks."""

    pipeline_name: ClassVar[str] = "ToyPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        "ToyTransformer2DModel": "toy_models.transformer:ToyTransformer2DModel"
    }
    _required_config_modules: ClassVar[tuple[str, ...]] = (
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    )

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages."""
        self.add_standard_t2i_stages()


class ToyVariationPipeline(ToyPipeline):
    """Image and text to image, in the hybrid style: one stage for all that is unusual, then the standard ones."""

    pipeline_name: ClassVar[str] = "ToyVariationPipeline"

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the stage before the loop, the loop, and decoding."""
        assert isinstance(self.config, ToyVariationPipelineConfig) and self.vae is not None
        before = ToyBeforeDenoisingStage(
            tokenizer=self.get_module("tokenizer"),
            vae=self.vae,
            scheduler=self.get_scheduler(),
            config=self.config,
        )
        self.add_stage(InputValidationStage(self.config), "input_validation")
        self.add_stage(before, "before_denoising")
        self.add_stage(DenoisingStage(self.config), "denoising")
        self.add_standard_decoding_stage()


EntryClass = [ToyPipeline, ToyVariationPipeline]
