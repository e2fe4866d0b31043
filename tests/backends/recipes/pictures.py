"""Pipelines of pictures over transformers."""

from __future__ import annotations

from typing import Any

from tests.backends.recipes import encoders
from tests.backends.recipes.build import CLASS, Tiny
from tests.backends.recipes.requests import mask, picture

SHIFTED = {"use_dynamic_shifting": True}
PACKED = 16
"""Channels of latents packed two by two."""
IMAGE = {"image": picture()}
PAINTED = {**IMAGE, "mask_image": mask()}
CONTROL = {"control_image": picture(1.0)}
HALF = {"hidden_size": 16, "projection_dim": 16}
"""Of one of two encoders whose embeddings lie side by side."""
SD3 = {"text_encoder": HALF, "text_encoder_2": HALF}
EIGHTH = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""A VAE of the usual scale, where the pipeline knows no other."""
SIXTEEN = {"vae": {"latent_channels": 16}, "transformer": {"in_channels": 16, "out_channels": 16}}
FLUX: dict[str, Any] = {"scheduler": SHIFTED}
FLUX_CONTROL = {"scheduler": SHIFTED, "transformer": {"in_channels": 2 * PACKED, "out_channels": PACKED}}
FLUX_FILL = {"scheduler": SHIFTED, "transformer": {"in_channels": 3 * PACKED, "out_channels": PACKED}}
FLUX_CONTROLNET: dict[str, Any] = {**FLUX, "controlnet": {CLASS: "FluxControlNetModel"}}
WIDE = {"width": 64}
SANA = {"text_encoder": {CLASS: "Gemma2Model"}}
QWEN_VL = {CLASS: "Qwen2_5_VLForConditionalGeneration", **encoders.QWEN_VL}
QWEN: dict[str, Any] = {
    "text_encoder": QWEN_VL,
    "scheduler": SHIFTED,
}
Z_IMAGE = {"text_encoder": {CLASS: "Qwen3Model"}}
LONG = {"max_sequence_length": 256}
"""Of a prompt within a longer template."""
VISUAL_CLOZE = FLUX_FILL | {"resolution": 32}
EXAMPLES = {
    "task_prompt": "each row turns a picture of waves into its negative",
    "content_prompt": "a cat",
    "image": [[picture(0.0, 32, 32), picture(1.0, 32, 32)], [picture(2.0, 32, 32), None]],
    "prompt": None,
    "max_sequence_length": 256,
}

TINIES = (
    Tiny("StableDiffusion3Pipeline", SD3),
    Tiny("StableDiffusion3Img2ImgPipeline", SD3, IMAGE),
    Tiny("StableDiffusion3InpaintPipeline", SD3 | SIXTEEN, PAINTED),
    Tiny("StableDiffusion3ControlNetPipeline", SD3 | {"controlnet": {CLASS: "SD3ControlNetModel"}}, CONTROL),
    Tiny("StableDiffusion3PAGPipeline", SD3 | {"pag_applied_layers": ["blocks.0"]}, {"pag_scale": 2.0}),
    Tiny("FluxPipeline", FLUX),
    Tiny("FluxImg2ImgPipeline", FLUX, IMAGE),
    Tiny("FluxInpaintPipeline", FLUX, PAINTED),
    Tiny("FluxFillPipeline", FLUX_FILL, PAINTED),
    Tiny("FluxControlPipeline", FLUX_CONTROL, CONTROL),
    Tiny("FluxControlImg2ImgPipeline", FLUX_CONTROL, {**IMAGE, **CONTROL}),
    Tiny("FluxControlInpaintPipeline", FLUX_CONTROL, {**PAINTED, **CONTROL}),
    Tiny("FluxControlNetPipeline", FLUX_CONTROLNET, CONTROL),
    Tiny("FluxKontextPipeline", FLUX, IMAGE | {"max_area": 32 * 48, "_auto_resize": False}),
    Tiny("Flux2KleinPipeline", {"text_encoder": {CLASS: "Qwen3ForCausalLM", "num_hidden_layers": 28}}),
    Tiny("PixArtAlphaPipeline"),
    Tiny("PixArtSigmaPipeline"),
    Tiny("PixArtSigmaPAGPipeline", {"pag_applied_layers": ["blocks.1"]}),
    Tiny("SanaPipeline", SANA, WIDE),
    Tiny(
        "SanaSprintPipeline",
        SANA
        | {
            "scheduler": {CLASS: "SCMScheduler"},
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        WIDE | {"num_inference_steps": 2},
    ),
    Tiny("SanaControlNetPipeline", SANA | {"controlnet": {CLASS: "SanaControlNetModel"}}, WIDE | CONTROL),
    Tiny("SanaPAGPipeline", SANA | {"pag_applied_layers": ["transformer_blocks.0"]}, WIDE),
    Tiny(
        "HunyuanDiTPipeline",
        {
            "text_encoder": {CLASS: "BertModel"},
            "safety_checker": None,
            "feature_extractor": None,
            "text_encoder_2": {},
            "tokenizer_2": {},
            "vae": EIGHTH,
        },
    ),
    Tiny("CogView3PlusPipeline"),
    Tiny("CogView4Pipeline"),
    Tiny("LuminaPipeline", {"text_encoder": {CLASS: "GemmaModel"}}),
    Tiny("Lumina2Pipeline", {"text_encoder": {CLASS: "Gemma2Model"}}, LONG),
    Tiny("AuraFlowPipeline"),
    Tiny("ChromaPipeline", FLUX),
    Tiny("ChromaImg2ImgPipeline", FLUX, IMAGE | {"strength": 0.6}),
    Tiny("HiDreamImagePipeline", {}, {"num_inference_steps": 2}),
    Tiny("QwenImagePipeline", QWEN, LONG),
    Tiny("QwenImageImg2ImgPipeline", QWEN, {**IMAGE, **LONG}),
    Tiny("QwenImageInpaintPipeline", QWEN, {**PAINTED, **LONG}),
    Tiny("QwenImageControlNetPipeline", QWEN | {"controlnet": {CLASS: "QwenImageControlNetModel"}}, CONTROL | LONG),
    Tiny("ZImagePipeline", Z_IMAGE),
    Tiny("ZImageImg2ImgPipeline", Z_IMAGE, IMAGE),
    Tiny("ZImageInpaintPipeline", Z_IMAGE, PAINTED),
    Tiny("BriaPipeline", {"scheduler": {CLASS: "FlowMatchEulerDiscreteScheduler"}}),
    Tiny(
        "HunyuanImagePipeline",
        {"text_encoder": {CLASS: "Qwen2_5_VLForConditionalGeneration", **encoders.QWEN_VL}},
        {"negative_prompt": None},
    ),
    Tiny("OvisImagePipeline", {"text_encoder": {CLASS: "Qwen3Model"}}, LONG),
    Tiny("AmusedPipeline", {"scheduler": {"mask_token_id": 31}, "vqvae": {"lookup_from_codebook": True}}),
    Tiny("VisualClozeGenerationPipeline", VISUAL_CLOZE, EXAMPLES),
    Tiny("DiTPipeline", {"id2label": None}, {"class_labels": [3]}),
)
