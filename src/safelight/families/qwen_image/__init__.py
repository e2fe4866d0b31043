"""Qwen-Image: text to image, editing of one image or several, and decomposition of an image into layers."""

from safelight.core.registry import register_configs

register_configs(model_family="qwen_image", pipeline_name="QwenImagePipeline", hf_model_paths=["Qwen/Qwen-Image"])
register_configs(
    model_family="qwen_image", pipeline_name="QwenImageEditPipeline", hf_model_paths=["Qwen/Qwen-Image-Edit"]
)
register_configs(
    model_family="qwen_image", pipeline_name="QwenImageEditPlusPipeline", hf_model_paths=["Qwen/Qwen-Image-Edit-2509"]
)
register_configs(
    model_family="qwen_image", pipeline_name="QwenImageLayeredPipeline", hf_model_paths=["Qwen/Qwen-Image-Layered"]
)
