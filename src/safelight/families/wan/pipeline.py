"""The Wan pipelines, in the modular style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs
from safelight.stages.causal_vae import CausalVAEDecodingStage, CausalVAEEncodingStage
from safelight.stages.decoding import DecodingStage
from safelight.stages.image_vae_encoding import ImageVAEEncodingStage


class WanPipeline(ComposedPipeline):
    """Text to video."""

    pipeline_name: ClassVar[str] = "WanPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLWan": "diffusers:AutoencoderKLWan",
        "WanTransformer3DModel": "safelight.families.wan.transformer:WanTransformer3DModel",
    }
    image_vae_encoding_stage: ClassVar[type[ImageVAEEncodingStage]] = CausalVAEEncodingStage
    decoding_stage: ClassVar[type[DecodingStage]] = CausalVAEDecodingStage
    alternates: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    _required_config_modules: ClassVar[tuple[str, ...]] = ("scheduler", "text_encoder", "tokenizer", "vae")
    _optional_config_modules: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages."""
        self.add_standard_ti2v_stages()


class WanImageToVideoPipeline(WanPipeline):
    """Text and images to video."""

    pipeline_name: ClassVar[str] = "WanImageToVideoPipeline"
    _optional_config_modules: ClassVar[tuple[str, ...]] = (
        *WanPipeline._optional_config_modules,
        "image_encoder",
        "image_processor",
    )


class WanDMDPipeline(WanPipeline):
    """Text to video in a few steps."""

    pipeline_name: ClassVar[str] = "WanDMDPipeline"
    _required_config_modules: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "vae")

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages, with the few-step loop."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        # Holds the schedule, which comes shifted from the configuration: the solver of the repository is not used.
        self._modules["scheduler"] = FlowMatchEulerDiscreteScheduler()
        self.add_standard_dmd_stages()


EntryClass = [WanPipeline, WanImageToVideoPipeline, WanDMDPipeline]
