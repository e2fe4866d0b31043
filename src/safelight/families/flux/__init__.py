"""FLUX.1: text to image (dev, schnell) and Kontext (text and image to image)."""

from safelight.core.registry import register_configs

register_configs(
    model_family="flux",
    pipeline_name="FluxPipeline",
    sampling_param_cls="safelight.families.flux.params:FluxSamplingParams",
    pipeline_config_cls="safelight.families.flux.config:FluxPipelineConfig",
    hf_model_paths=["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"],
)
register_configs(
    model_family="flux",
    pipeline_name="FluxKontextPipeline",
    sampling_param_cls="safelight.families.flux.params:FluxKontextSamplingParams",
    pipeline_config_cls="safelight.families.flux.config:FluxKontextPipelineConfig",
    hf_model_paths=["black-forest-labs/FLUX.1-Kontext-dev"],
)
