"""Qwen-Image: text to image, editing of one image or several, and decomposition of an image into layers."""

from safelight.core.registry import register_configs

register_configs(
    model_family="qwen_image",
    pipeline_name="QwenImagePipeline",
    sampling_param_cls="safelight.families.qwen_image.params:QwenImageSamplingParams",
    pipeline_config_cls="safelight.families.qwen_image.config:QwenImagePipelineConfig",
    hf_model_paths=["Qwen/Qwen-Image"],
)
register_configs(
    model_family="qwen_image",
    pipeline_name="QwenImageEditPipeline",
    sampling_param_cls="safelight.families.qwen_image.params:QwenImageEditSamplingParams",
    pipeline_config_cls="safelight.families.qwen_image.config:QwenImageEditPipelineConfig",
    hf_model_paths=["Qwen/Qwen-Image-Edit"],
)
register_configs(
    model_family="qwen_image",
    pipeline_name="QwenImageEditPlusPipeline",
    sampling_param_cls="safelight.families.qwen_image.params:QwenImageEditPlusSamplingParams",
    pipeline_config_cls="safelight.families.qwen_image.config:QwenImageEditPlusPipelineConfig",
    hf_model_paths=["Qwen/Qwen-Image-Edit-2509"],
)
register_configs(
    model_family="qwen_image",
    pipeline_name="QwenImageLayeredPipeline",
    sampling_param_cls="safelight.families.qwen_image.params:QwenImageLayeredSamplingParams",
    pipeline_config_cls="safelight.families.qwen_image.config:QwenImageLayeredPipelineConfig",
    hf_model_paths=["Qwen/Qwen-Image-Layered"],
)
