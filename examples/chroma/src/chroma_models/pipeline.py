"""The Chroma pipeline, in the modular style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs


class ChromaPipeline(ComposedPipeline):
    """Text to image."""

    pipeline_name: ClassVar[str] = "ChromaPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        "ChromaTransformer2DModel": "chroma_models.transformer:ChromaTransformer2DModel"
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


EntryClass = [ChromaPipeline]
