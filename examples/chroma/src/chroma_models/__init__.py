"""Chroma for Safelight. Importing this registers it, and imports no torch."""

from safelight import register_configs

register_configs(
    model_family="chroma",
    pipeline_name="ChromaPipeline",
    sampling_param_cls="chroma_models.params:ChromaSamplingParams",
    pipeline_config_cls="chroma_models.config:ChromaPipelineConfig",
    hf_model_paths=["lodestones/Chroma1-HD"],
    package="chroma_models",
)
