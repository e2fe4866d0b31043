"""Two toy models for Safelight. Importing this registers them, and imports no torch."""

from safelight import register_configs

register_configs(
    model_family="toy",
    pipeline_name="ToyPipeline",
    sampling_param_cls="toy_models.params:ToySamplingParams",
    pipeline_config_cls="toy_models.config:ToyPipelineConfig",
    hf_model_paths=[],
    package="toy_models",
)
register_configs(
    model_family="toy",
    pipeline_name="ToyVariationPipeline",
    sampling_param_cls="toy_models.params:ToyVariationSamplingParams",
    pipeline_config_cls="toy_models.config:ToyVariationPipelineConfig",
    hf_model_paths=[],
    package="toy_models",
)
