"""FLUX.1: text to image (dev, schnell) and Kontext (text and image to image)."""

from safelight.core.registry import register_configs

register_configs(
    model_family="flux",
    pipeline_name="FluxPipeline",
    hf_model_paths=["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"],
)
register_configs(
    model_family="flux", pipeline_name="FluxKontextPipeline", hf_model_paths=["black-forest-labs/FLUX.1-Kontext-dev"]
)
