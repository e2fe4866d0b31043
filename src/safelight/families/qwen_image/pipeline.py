"""The Qwen-Image pipelines: three in the modular style, and the layered one in the hybrid style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from safelight.core.components import Methods
from safelight.core.pipeline import ComposedPipeline
from safelight.core.server_args import ServerArgs
from safelight.families.qwen_image.caption import encode_headless, write_tokens
from safelight.families.qwen_image.config import QwenImageLayeredPipelineConfig
from safelight.families.qwen_image.stages import QwenImageLayeredBeforeDenoisingStage
from safelight.stages.denoising import DenoisingStage
from safelight.stages.input_validation import InputValidationStage

TRANSFORMER = {"QwenImageTransformer2DModel": "safelight.families.qwen_image.transformer:QwenImageTransformer2DModel"}


class QwenImagePipeline(ComposedPipeline):
    """Text to image. The text encoder is loaded without its head, which makes words."""

    pipeline_name: ClassVar[str] = "QwenImagePipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        **TRANSFORMER,
        "Qwen2_5_VLForConditionalGeneration": "transformers:Qwen2_5_VLModel",
    }
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("visual",)}
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


class QwenImageEditPipeline(QwenImagePipeline):
    """Text and an image to image."""

    pipeline_name: ClassVar[str] = "QwenImageEditPipeline"
    optional_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _required_config_modules: ClassVar[tuple[str, ...]] = (*QwenImagePipeline._required_config_modules, "processor")

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add the standard stages, the input images' among them."""
        self.add_standard_ti2i_stages()


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Text and one image or several to image."""

    pipeline_name: ClassVar[str] = "QwenImageEditPlusPipeline"


class QwenImageLayeredPipeline(QwenImageEditPipeline):
    """An image into its layers, each with transparency. The text encoder's head writes a caption if need be."""

    pipeline_name: ClassVar[str] = "QwenImageLayeredPipeline"
    component_classes: ClassVar[Mapping[str, str]] = {
        **TRANSFORMER,
        "Qwen2_5_VLForConditionalGeneration": "transformers:Qwen2_5_VLForConditionalGeneration",
    }
    component_methods: ClassVar[Mapping[str, Methods]] = {
        "text_encoder": {"encode": encode_headless, "write": write_tokens}
    }

    def create_pipeline_stages(self, server_args: ServerArgs) -> None:
        """Add one stage for all that comes before the loop, then the standard loop and decoding."""
        assert isinstance(self.config, QwenImageLayeredPipelineConfig)
        assert self.vae is not None
        before = QwenImageLayeredBeforeDenoisingStage(self.components.modules, self.vae, self.config)
        self.add_stage(InputValidationStage(self.config), "input_validation")
        self.add_stage(before, "before_denoising")
        self.add_stage(DenoisingStage(self.config), "denoising")
        self.add_standard_decoding_stage()


EntryClass = [QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageLayeredPipeline]
