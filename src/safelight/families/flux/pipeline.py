"""The FLUX.1 pipelines, in the modular style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs


class FluxPipeline(ComposedPipeline):
    """Text to image."""

    pipeline_name: ClassVar[str] = "FluxPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        "FluxTransformer2DModel": "safelight.families.flux.transformer:FluxTransformer2DModel"
    }
    _required_config_modules: ClassVar[tuple[str, ...]] = (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
    )

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages."""
        self.add_standard_t2i_stages()


class FluxKontextPipeline(FluxPipeline):
    """Text and an optional image to image."""

    pipeline_name: ClassVar[str] = "FluxKontextPipeline"

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages, the input image's among them."""
        self.add_standard_ti2i_stages()


EntryClass = [FluxPipeline, FluxKontextPipeline]
