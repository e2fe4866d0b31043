"""Tiny random checkpoints of pipelines whose components or calls are unlike most: built by the package itself."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    PNDMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
    VQModel,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from safelight.testing.recipes import shake
from safelight.testing.tokenizers import clip_tokenizer, t5_tokenizer
from tests.recipes import wan

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 15,
    "projection_dim": 32,
}


def kl_vae(seed):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    return shake(vae, seed)


def text_encoder(tokenizer, seed):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return shake(CLIPTextModel(config), seed)


def safety_checker(threshold):
    """Return a checker that flags every picture (a threshold below all cosines), or none."""
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config={**text, "vocab_size": 30}, vision_config=VISION, projection_dim=32)
    )
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


def unet_2d(seed):
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    return shake(unet, seed)


def stable_diffusion(folder, threshold=2.0):
    """Return the components of Stable Diffusion 1.5, its safety checker among them."""
    clip = clip_tokenizer(folder / "tokenizer", 16)
    return {
        "unet": unet_2d(1),
        "scheduler": PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        "vae": kl_vae(2),
        "text_encoder": text_encoder(clip, 3),
        "tokenizer": clip,
        "safety_checker": safety_checker(threshold),
        "feature_extractor": CLIPImageProcessorPil(size=30, crop_size=30),
    }


def wan_vace(folder):
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=wan.TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
        vace_layers=[0],
        vace_in_channels=4 * 2 + 64,
    )
    return {
        **wan.text_components(folder),
        "transformer": shake(transformer, 4),
        "vae": shake(wan.vae(False), 1),
        "scheduler": wan.solver(3.0),
    }


def ddpm(folder):
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    return {"unet": shake(unet, 1), "scheduler": DDPMScheduler()}


def ddim(folder):
    return {**ddpm(folder), "scheduler": DDIMScheduler()}


def dit(folder):
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,  # the pipeline's own class for none is number 1000
    )
    return {"transformer": shake(transformer, 1), "vae": kl_vae(2), "scheduler": DDIMScheduler()}


def stable_video_diffusion(folder):
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=2,
        cross_attention_dim=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4, layers_per_block=1
    )
    torch.manual_seed(0)
    return {
        "vae": shake(vae, 1, 0.05),
        "image_encoder": shake(
            CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, "image_size": 224, "patch_size": 112})), 2
        ),
        "unet": shake(unet, 3, 0.05),
        "scheduler": EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True, sigma_max=70.0),
        "feature_extractor": CLIPImageProcessorPil(),
    }


def stable_diffusion_controlnet(folder):
    parts = stable_diffusion(folder)
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8))
    return {**parts, "controlnet": shake(control, 5)}


def longcat_audio_dit(folder):
    t5 = t5_tokenizer(folder / "tokenizer")
    text = UMT5Config(vocab_size=len(t5), d_model=32, num_layers=1, num_heads=4, d_ff=64)
    transformer = LongCatAudioDiTTransformer(
        dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False
    )
    vae = LongCatAudioDiTVae(
        in_channels=1,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=24000,
    )
    return {
        "transformer": shake(transformer, 1),
        "vae": vae,
        "text_encoder": shake(UMT5EncoderModel(text), 2),
        "tokenizer": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    }


def kandinsky(folder):
    """Return the components of a pipeline that holds two others, of a prior and of a decoder."""
    clip = clip_tokenizer(folder / "prior_tokenizer", 77)
    text = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    prior = shake(prior, 3)
    torch.nn.init.ones_(dict(prior.named_parameters())["clip_std"])
    return {
        "unet": shake(unet, 1),
        "scheduler": DDPMScheduler(),
        "movq": shake(movq, 2),
        "prior_prior": prior,
        "prior_image_encoder": shake(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)), 4),
        "prior_text_encoder": shake(CLIPTextModelWithProjection(text), 5),
        "prior_tokenizer": clip,
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "prior_image_processor": CLIPImageProcessorPil(size=30, crop_size=30),
    }
