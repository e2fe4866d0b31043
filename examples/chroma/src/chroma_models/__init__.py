"""Chroma for Safelight. Importing this registers it, and imports no torch."""

from safelight import register_configs

register_configs(
    model_family="chroma",
    pipeline_name="ChromaPipeline",
    hf_model_paths=["lodestones/Chroma1-HD"],
    package="chroma_models",
)
