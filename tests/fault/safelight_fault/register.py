"""Pipelines of a known step time that fail as their prompt says: `[oom@denoising:2] a cat`."""

from safelight.core.registry import register_configs

for name, params, config in (
    ("FaultPipeline", "FaultSamplingParams", "FaultConfig"),
    ("FaultVideoPipeline", "FaultVideoSamplingParams", "FaultVideoConfig"),
):
    register_configs(
        model_family="fault",
        pipeline_name=name,
        sampling_param_cls=f"safelight_fault.params:{params}",
        pipeline_config_cls=f"safelight_fault.config:{config}",
        hf_model_paths=[],
        package="safelight_fault",
    )
