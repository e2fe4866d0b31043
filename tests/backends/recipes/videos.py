"""Pipelines of videos, and of sound."""

from __future__ import annotations

from typing import Any

from tests.backends.recipes.build import CLASS, Tiny
from tests.backends.recipes.pictures import IMAGE
from tests.backends.recipes.requests import clip
from tests.backends.recipes.unets import CONTROLNET

UNIPC = {
    CLASS: "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
WAN: dict[str, Any] = {"text_encoder": {CLASS: "UMT5EncoderModel"}, "scheduler": UNIPC}
I2V: dict[str, Any] = {
    "transformer": {"in_channels": 12, "image_dim": 32},
    "image_encoder": {CLASS: "CLIPVisionModel"},
    "image_processor": {},
}
VIDEO = {"video": clip(), "num_frames": None}
MOTION = {"motion_adapter": {CLASS: "MotionAdapter"}, "unet": {CLASS: "UNetMotionModel"}}
ANIMATE: dict[str, Any] = {**MOTION, "feature_extractor": None, "image_encoder": None}
COG: dict[str, Any] = {"scheduler": {CLASS: "CogVideoXDDIMScheduler"}}
LTX: dict[str, Any] = {"transformer": {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2}}
SKYREELS = {
    **WAN,
    "scheduler": {
        CLASS: "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 8.0,
    },
}

TINIES = (
    Tiny("WanPipeline", WAN | {"transformer": {}, "transformer_2": {}, "boundary_ratio": 0.9}),
    Tiny("WanImageToVideoPipeline", WAN | I2V, IMAGE),
    Tiny("WanVideoToVideoPipeline", WAN, VIDEO),
    Tiny("WanVACEPipeline", WAN | {"transformer": {"vace_layers": [0], "vace_in_channels": 4 * 2 + 64}}),
    Tiny("HunyuanVideoPipeline", {"text_encoder_2": {"max_position_embeddings": 77}}),
    Tiny("LTXPipeline", LTX, {"num_frames": 9, "width": 64}),
    Tiny("LTXImageToVideoPipeline", LTX, {"num_frames": 9, "width": 64, **IMAGE}),
    Tiny("LTXConditionPipeline", LTX, {"num_frames": 9, "width": 64, **IMAGE}),
    Tiny("LTX2Pipeline", {}, {"num_frames": 9, "width": 64, "spatio_temporal_guidance_blocks": [0]}),
    Tiny("CogVideoXPipeline", COG, {"num_frames": 9}),
    Tiny("CogVideoXImageToVideoPipeline", COG | {"transformer": {"in_channels": 8}}, {"num_frames": 9, **IMAGE}),
    Tiny("CogVideoXVideoToVideoPipeline", COG, {"video": clip(9)}),
    Tiny("MochiPipeline"),
    Tiny("LattePipeline", {}, {"video_length": 5}),
    Tiny("AnimateDiffPipeline", ANIMATE),
    Tiny("AnimateDiffControlNetPipeline", ANIMATE | CONTROLNET, {"conditioning_frames": clip()}),
    Tiny("AnimateDiffVideoToVideoPipeline", ANIMATE, VIDEO),
    Tiny(
        "StableVideoDiffusionPipeline",
        {"image_encoder": {"image_size": 224, "patch_size": 112}},
        {"num_frames": 3, "decode_chunk_size": 2},
    ),
    Tiny(
        "SanaVideoPipeline",
        {"text_encoder": {CLASS: "Gemma2Model"}, "vae": {CLASS: "AutoencoderKLWan"}},
        {"width": 64, "frames": 5},
    ),
    Tiny("SkyReelsV2Pipeline", SKYREELS),
    Tiny("SkyReelsV2DiffusionForcingPipeline", SKYREELS),
    Tiny("StableAudioPipeline", {}, {"audio_end_in_s": 0.01}),
)
