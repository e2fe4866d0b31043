"""Conventions of the pipelines that fail."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from safelight.core.config import COND, PipelineConfig
from safelight.core.schema import ModelSchema, ModelTaskType

MULTIPLE = 8
FRAME_STEP = 4


@dataclass(frozen=True, kw_only=True)
class FaultConfig(PipelineConfig):
    """Conventions of `FaultPipeline`."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2I
    frame_step: ClassVar[int] = 1

    step_seconds: float
    decode_seconds: float

    @classmethod
    def from_model(cls, component_configs: Mapping[str, Mapping[str, Any]]) -> Self:
        """Build from the index."""
        return cls(
            vae_scale_factor=MULTIPLE,
            latent_channels=4,
            vae_scale=1.0,
            vae_shift=0.0,
            step_seconds=component_configs["model_index"].get("step_seconds", 0.0),
            decode_seconds=component_configs["model_index"].get("decode_seconds", 0.0),
        )

    def model_schema(self, model: str, pipeline_name: str, params_cls: Any, defaults: Any) -> ModelSchema:
        """Say what is taken."""
        return ModelSchema(
            model=model,
            pipeline_name=pipeline_name,
            task=self.task,
            params_cls=params_cls,
            defaults={**params_cls.defaults, **defaults},
            size_multiple=MULTIPLE,
            num_input_images=(0, 2),
            frame_step=self.frame_step,
        )

    def call_signature(self, branch: str, batch: Any) -> Any:
        """Sizes."""
        return batch.raw_latent_shape

    def prepare_branch_kwargs(self, branch: str, batch: Any, latent_model_input: Any, t: Any) -> Any:
        """The latents; another branch sees them negated."""
        return {"hidden_states": latent_model_input if branch == COND else -latent_model_input}


@dataclass(frozen=True, kw_only=True)
class FaultVideoConfig(FaultConfig):
    """Conventions of `FaultVideoPipeline`."""

    task: ClassVar[ModelTaskType] = ModelTaskType.TI2V
    frame_step: ClassVar[int] = FRAME_STEP
