"""Wan: text to video (2.1, 2.2, TI2V-5B, and FastWan in a few steps), and text and images to video."""

from safelight.core.registry import register_configs

register_configs(
    model_family="wan",
    pipeline_name="WanPipeline",
    hf_model_paths=[
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ],
)
register_configs(
    model_family="wan",
    pipeline_name="WanImageToVideoPipeline",
    hf_model_paths=["Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"],
)
register_configs(
    model_family="wan",
    pipeline_name="WanDMDPipeline",
    hf_model_paths=[
        "FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    ],
)
