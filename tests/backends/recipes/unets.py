"""Pipelines of pictures over UNets."""

from __future__ import annotations

from typing import Any

from tests.backends.recipes.build import CLASS, Tiny
from tests.backends.recipes.pictures import CONTROL, HALF, IMAGE, PAINTED
from tests.backends.recipes.requests import picture

SD: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
IN_IMAGE = {"image": picture(1.0)}
"""A control image, where it has that name."""
CHANNELS_OF_PAINTING = 9
"""Noise, what is seen, and the mask."""
XL_UNET = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
XL: dict[str, Any] = {"unet": XL_UNET, "text_encoder": HALF, "text_encoder_2": HALF}
XL_CONTROL = {**XL, "controlnet": XL_UNET}
ATTENDING = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Where an adapter finds the size that it makes."""
LCM = {"unet": {"time_cond_proj_dim": 16}, "scheduler": {CLASS: "LCMScheduler"}}
STRONG = {"strength": 0.8}
"""With which at least two of three steps are made."""
CONTROLNET = {"controlnet": {CLASS: "ControlNetModel"}}
PAG = {"pag_applied_layers": ["mid", "up.block_0.attentions_0"]}
DPT: dict[str, Any] = {
    CLASS: "DPTForDepthEstimation",
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 16, 16],
    "fusion_hidden_size": 16,
    "image_size": 384,
    "patch_size": 16,
}
KANDINSKY: dict[str, Any] = {
    "unet": {
        "out_channels": 8,
        "addition_embed_type": "image",
        "encoder_hid_dim": 32,
        "encoder_hid_dim_type": "image_proj",
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "movq": {"norm_type": "spatial", "num_vq_embeddings": 12, "block_out_channels": (32, 64), "norm_num_groups": 32},
    "scheduler": {CLASS: "DDPMScheduler"},
}
MARIGOLD: dict[str, Any] = {"unet": {"in_channels": 8}, "scheduler": {CLASS: "DDIMScheduler"}}
TINIES = (
    Tiny("StableDiffusionPipeline", SD | {"scheduler": {CLASS: "PNDMScheduler", "skip_prk_steps": True}}),
    Tiny("StableDiffusionImg2ImgPipeline", SD, IMAGE),
    Tiny("StableDiffusionInpaintPipeline", SD | {"unet": {"in_channels": CHANNELS_OF_PAINTING}}, PAINTED),
    Tiny("StableDiffusionControlNetPipeline", SD | CONTROLNET, IN_IMAGE),
    Tiny("StableDiffusionControlNetImg2ImgPipeline", SD | CONTROLNET, IMAGE | CONTROL),
    Tiny("StableDiffusionControlNetInpaintPipeline", SD | CONTROLNET, PAINTED | CONTROL),
    Tiny(
        "StableDiffusionUpscalePipeline",
        {"unet": {"in_channels": 7, "num_class_embeds": 1000}, "safety_checker": None, "feature_extractor": None},
        {"image": picture(0, 16, 24), "noise_level": 20},
    ),
    Tiny("StableDiffusionInstructPix2PixPipeline", SD | {"unet": {"in_channels": 8}}, IMAGE),
    Tiny(
        "StableDiffusionDepth2ImgPipeline",
        {"unet": {"in_channels": 5}, "depth_estimator": DPT, "feature_extractor": {CLASS: "DPTImageProcessorPil"}},
        IMAGE,
    ),
    Tiny("StableDiffusionAdapterPipeline", SD | {"adapter": {CLASS: "T2IAdapter"}, "unet": ATTENDING}, IN_IMAGE),
    Tiny("StableDiffusionPAGPipeline", SD | PAG),
    Tiny("StableDiffusionPAGImg2ImgPipeline", SD | PAG, IMAGE),
    Tiny("StableDiffusionControlNetPAGPipeline", SD | CONTROLNET | PAG, IN_IMAGE),
    Tiny("LatentConsistencyModelPipeline", SD | LCM),
    Tiny("LatentConsistencyModelImg2ImgPipeline", SD | LCM, IMAGE),
    Tiny("StableDiffusionXLPipeline", XL),
    Tiny("StableDiffusionXLImg2ImgPipeline", XL, IMAGE | STRONG),
    Tiny("StableDiffusionXLInpaintPipeline", XL, PAINTED),
    Tiny("StableDiffusionXLControlNetPipeline", XL_CONTROL, IN_IMAGE),
    Tiny("StableDiffusionXLControlNetImg2ImgPipeline", XL_CONTROL, IMAGE | CONTROL),
    Tiny("StableDiffusionXLControlNetInpaintPipeline", XL_CONTROL, PAINTED | CONTROL),
    Tiny("StableDiffusionXLInstructPix2PixPipeline", {**XL, "unet": {**XL_UNET, "in_channels": 8}}, IMAGE),
    Tiny(
        "StableDiffusionXLAdapterPipeline",
        XL | {"adapter": {CLASS: "T2IAdapter"}, "unet": {**XL_UNET, **ATTENDING}},
        IN_IMAGE,
    ),
    Tiny("StableDiffusionXLPAGPipeline", XL | PAG),
    Tiny("KandinskyV22CombinedPipeline", KANDINSKY),
    Tiny("KandinskyV22Img2ImgCombinedPipeline", KANDINSKY, STRONG | {"image": picture(0, 64, 64)}),
    Tiny("Kandinsky3Pipeline"),
    Tiny("Kandinsky3Img2ImgPipeline", {}, STRONG | {"image": picture(0, 64, 64)}),
    Tiny("MarigoldDepthPipeline", MARIGOLD, {"image": picture(), "processing_resolution": 0}),
    Tiny("MarigoldNormalsPipeline", MARIGOLD, {"image": picture(), "processing_resolution": 0}),
    Tiny("ConsistencyModelPipeline", {"unet": {"in_channels": 3}}, {"num_inference_steps": 2}),
    Tiny("DDPMPipeline"),
    Tiny("DDIMPipeline", {}, {"eta": 0.5}),
)
