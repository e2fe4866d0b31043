"""The Wan pipelines, in the modular style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs


class WanPipeline(ComposedPipeline):
    """Text to video."""

    pipeline_name: ClassVar[str] = "WanPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLWan": "diffusers:AutoencoderKLWan",
        "WanTransformer3DModel": "safelight.families.wan.transformer:WanTransformer3DModel",
    }
    alternates = ("transformer", "transformer_2")
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
        self.add_standard_dmd_stages()

    def get_scheduler(self) -> Any:
        """Return what holds the schedule, which comes shifted from the configuration: no solver steps."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()


EntryClass = [WanPipeline, WanImageToVideoPipeline, WanDMDPipeline]
