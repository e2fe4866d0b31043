"""Tiny random Wan checkpoints, and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from safelight.testing.recipes import Case, Recipe, shake
from safelight.testing.tokenizers import t5_tokenizer
from tests.recipes.flux import CAT, MAP, photo

NEGATIVE = "blurry,   low quality &amp;amp; watermark "
BROKEN = "\uff41 \uff43\uff41\uff54\x07 with \u201c\ufb02owers\u201d, a caf\xc3\xa9 and a dog\u2019s \ufb01eld\x1b[1m"
"""Fullwidth letters, ligatures, curly quotes, control codes, and UTF-8 that was read as Latin-1."""
TRANSFORMER_GAINS = {"*.attn?.to_out.0.weight": 3.0, "*.attn?.norm_*": 1.5}
"""Attention that picks out, and what it picks."""
TEXT_DIM, CLIP_DIM = 24, 20


def vae(residual: bool) -> AutoencoderKLWan:
    """Return a VAE of small width: of 2.1, or the one of TI2V-5B with residual blocks and patches."""
    channels = 6 if residual else 4
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16} if residual else {}
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * index - 0.2 for index in range(channels)],
        latents_std=[0.8 + 0.3 * index for index in range(channels)],
        is_residual=residual,
        **patches,
    )


def transformer(
    seed: int, in_channels: int, out_channels: int, num_layers: int = 2, **config: Any
) -> WanTransformer3DModel:
    """Return a transformer, of two blocks unless more are asked for."""
    made = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=num_layers,
        rope_max_seq_len=64,
        **config,
    )
    return shake(made, seed, gains=TRANSFORMER_GAINS)


def text_components(folder: Path) -> dict[str, Any]:
    """Return the text encoder and its tokenizer, which is saved into `folder` on the way."""
    tokenizer = t5_tokenizer(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return {"text_encoder": shake(UMT5EncoderModel(config), 2), "tokenizer": tokenizer}


def solver(flow_shift: float) -> UniPCMultistepScheduler:
    """Return the solver of Wan's repositories."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def build(folder: Path, variant: str) -> None:
    """Write a `WanPipeline` checkpoint: 2.1, 2.2 with one or two transformers, or TI2V-5B."""
    torch.manual_seed(0)
    ti2v, channels = variant == "ti2v", 6 if variant == "ti2v" else 4
    models: dict[str, Any] = {"transformer": transformer(4, channels, channels)}
    details: dict[str, Any] = {"expand_timesteps": ti2v}
    if variant in ("2.2", "low noise"):
        models["transformer_2"] = transformer(5, channels, channels)
        details["boundary_ratio"] = 0.875
    if variant == "low noise":
        models["transformer"], details["boundary_ratio"] = None, 1.0
    components = {**text_components(folder), **models, "vae": shake(vae(ti2v), 1), "scheduler": solver(3.0)}
    WanPipeline(**components, **details).save_pretrained(folder)


def build_image_to_video(folder: Path, variant: str) -> None:
    """Write a `WanImageToVideoPipeline` checkpoint: 2.1, the same with a last image, 2.2, or TI2V-5B."""
    torch.manual_seed(0)
    ti2v, channels = variant == "ti2v", 6 if variant == "ti2v" else 4
    in_channels = channels if ti2v else 2 * channels + 4
    details: dict[str, Any] = {"expand_timesteps": ti2v}
    models: dict[str, Any] = {}
    if variant in ("default", "last image"):
        config = CLIPVisionConfig(
            hidden_size=CLIP_DIM,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        num_tokens = 2 * (1 + (28 // 14) ** 2) if variant == "last image" else None
        embedding: dict[str, Any] = {"image_dim": CLIP_DIM, "added_kv_proj_dim": 32, "pos_embed_seq_len": num_tokens}
        models["image_encoder"] = shake(CLIPVisionModel(config), 3)
        models["image_processor"] = CLIPImageProcessorPil(size=28, crop_size=28)
        models["transformer"] = transformer(4, in_channels, channels, **embedding)
    else:
        models["transformer"] = transformer(4, in_channels, channels)
    if variant == "2.2":
        models["transformer_2"] = transformer(5, in_channels, channels)
        details["boundary_ratio"] = 0.9
    components = {**text_components(folder), **models, "vae": shake(vae(ti2v), 1), "scheduler": solver(5.0)}
    WanImageToVideoPipeline(**components, **details).save_pretrained(folder)


def build_dmd(folder: Path, variant: str) -> None:
    """Write a `WanDMDPipeline` checkpoint: `WanPipeline`'s, under another class name."""
    build(folder, variant)
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "WanDMDPipeline"}))


def loaded_components(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Load what is in a folder as Diffusers does.

    Without another package Diffusers cannot read a model of which some modules are kept in float32, so its own list of
    them is followed here. VAE and image encoder are float32, as its documentation of Wan has them.
    """
    found: dict[str, Any] = {}
    for name in ("transformer", "transformer_2"):
        if (folder / name).is_dir():
            model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / name))
            weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
            kept = set(model._keep_in_fp32_modules)
            cast = {key: weight if kept & set(key.split(".")) else weight.to(dtype) for key, weight in weights.items()}
            model.load_state_dict(cast, assign=True)
            found[name] = model.eval()
    found["tokenizer"] = T5Tokenizer.from_pretrained(folder / "tokenizer")
    found["text_encoder"] = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    found["vae"] = AutoencoderKLWan.from_pretrained(folder / "vae", low_cpu_mem_usage=False)
    found["scheduler"] = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    if (folder / "image_encoder").is_dir():
        found["image_encoder"] = CLIPVisionModel.from_pretrained(folder / "image_encoder")
        found["image_processor"] = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    return found


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the pipeline that the index names."""
    index = json.loads((folder / "model_index.json").read_text())
    cls = {"WanPipeline": WanPipeline, "WanImageToVideoPipeline": WanImageToVideoPipeline}[index["_class_name"]]
    details = {name: index[name] for name in ("boundary_ratio", "expand_timesteps")}
    return cls(**loaded_components(folder, dtype), **details)


class DMDReference:
    """Few-step sampling by distribution matching, after its paper and FastVideo's description, over Diffusers' parts.

    The noise level of a timestep is the nearest of the training schedule with flow shift 8; the model is told the
    timestep itself. Clean latents are x - sigma * v, and (1 - sigma) * clean + sigma * noise is what comes next.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        components = loaded_components(folder, dtype)
        self.pipe = WanPipeline(**components, expand_timesteps=index["expand_timesteps"])
        self.text_encoder, self.scheduler = self.pipe.text_encoder, SimpleNamespace()

    def set_progress_bar_config(self, disable: bool) -> None:
        """There is no bar."""

    def to(self, device: torch.device) -> DMDReference:
        """Move its parts."""
        self.pipe.to(device)
        return self

    def prepare_latents(self, *args: Any) -> torch.Tensor:
        """Draw the initial noise."""
        drawn: torch.Tensor = self.pipe.prepare_latents(*args)
        return drawn

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        timesteps: Any = (1000.0, 757.0, 522.0),
        num_videos_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        max_sequence_length: int = 512,
    ) -> Any:
        """Return videos [B, T, H, W, C] in a tuple."""
        pipe = self.pipe
        embeds, _ = pipe.encode_prompt(prompt, None, False, max_sequence_length=max_sequence_length)
        embeds = embeds.to(pipe.transformer.dtype)
        table = FlowMatchEulerDiscreteScheduler(shift=8.0)
        levels = [table.sigmas[(table.timesteps - t).abs().argmin()] for t in timesteps]
        self.scheduler.timesteps = torch.tensor(timesteps)
        self.scheduler.sigmas = torch.stack([*levels, torch.tensor(0.0)])
        channels, batch = pipe.transformer.config.in_channels, len(prompt)
        latents = self.prepare_latents(
            batch, channels, height, width, num_frames, torch.float32, pipe.transformer.device, generator, None
        )
        for step, t in enumerate(self.scheduler.timesteps):
            steered = t.to(latents.device).expand(batch)
            if pipe.config.expand_timesteps:
                num_tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
                steered = t.to(latents.device).expand(batch, num_tokens)
            noisy = latents.to(pipe.transformer.dtype)
            velocity = pipe.transformer(noisy, steered, embeds, return_dict=False)[0].float()
            latents = latents - levels[step] * velocity
            if step + 1 < len(levels):
                fresh = torch.cat([torch.randn((1, *latents.shape[1:]), generator=source) for source in generator])
                latents = (1 - levels[step + 1]) * latents + levels[step + 1] * fresh.to(latents.device)
            callback_on_step_end(self, step, t, {"latents": latents})
        std, mean = (
            torch.tensor(pipe.vae.config[name])[None, :, None, None, None] for name in ("latents_std", "latents_mean")
        )
        video = pipe.vae.decode(latents * std.to(latents) + mean.to(latents), return_dict=False)[0]
        return (pipe.video_processor.postprocess_video(video, output_type=output_type),)


class DMDRecipe(Recipe):
    """A recipe whose reference is written here."""

    def reference_class(self) -> Any:
        """Return the class above."""
        return DMDReference


def signature_size(pipe: Any) -> tuple[int, int]:
    """Return the default size, which is in the signatures."""
    return 480, 832


SMALL = {"height": 48, "width": 80, "num_frames": 5, "num_inference_steps": 4}
TALL = {"height": 80, "width": 32, "num_frames": 9, "num_inference_steps": 3}
SHORT = {"max_sequence_length": 48}

WAN = Recipe(
    "WanPipeline",
    build,
    cases=(
        Case("2.1", {"prompt": CAT, **SMALL, **SHORT, "negative_prompt": NEGATIVE}),
        Case("2.1, 80x32, 9 frames", {"prompt": MAP, **TALL, "guidance_scale": 2.5, "seed": 11}),
        Case("2.1, no guidance, 13 frames", {"prompt": MAP, **SMALL, **SHORT, "num_frames": 13, "guidance_scale": 1.0}),
        Case("2.1, two prompts, n=2", {"prompt": [CAT, MAP], "n": 2, **SMALL, **SHORT, "seed": 5}),
        Case("2.1, markup in the prompt", {"prompt": "a &amp;lt;b&gt;\n  cat ", **TALL, **SHORT, "num_frames": 1}),
        Case("2.1, prompts to be mended", {"prompt": BROKEN, "negative_prompt": BROKEN[::-1], **TALL, **SHORT}),
        Case("2.2", {"prompt": MAP, **SMALL, **SHORT, "guidance_scale_2": 3.0}, variant="2.2"),
        Case("2.2, one scale", {"prompt": CAT, **TALL, **SHORT, "negative_prompt": NEGATIVE}, variant="2.2"),
        Case(
            "2.2, low noise only",
            {"prompt": CAT, **TALL, **SHORT, "guidance_scale": 4.0, "guidance_scale_2": 2.0},
            variant="low noise",
        ),
        Case("TI2V-5B", {"prompt": MAP, **SMALL, **SHORT, "height": 64, "width": 96, "num_frames": 9}, variant="ti2v"),
    ),
    load_reference=load_reference,
    default_size=signature_size,
    silent={"image": "the reference takes none: with a first frame it is held to WanImageToVideoPipeline"},
)

IMAGE_TO_VIDEO = Recipe(
    "WanImageToVideoPipeline",
    build_image_to_video,
    cases=(
        Case("2.1", {"prompt": CAT, "image": photo(90, 70), **SMALL, "negative_prompt": NEGATIVE}),
        Case("2.1, 80x32, 9 frames", {"prompt": MAP, "image": photo(33, 61), **TALL, "guidance_scale": 1.0}),
        Case("2.1, a prompt to be mended", {"prompt": BROKEN, "image": photo(33, 61), **TALL, "guidance_scale": 1.0}),
        Case("2.1, two prompts", {"prompt": [CAT, MAP], "image": photo(80, 48), **SMALL, "seed": 5}),
        Case(
            "2.1, last image",
            {"prompt": CAT, "image": photo(90, 70), "last_image": photo(50, 70), **TALL, "seed": 3},
            variant="last image",
        ),
        Case("2.2", {"prompt": MAP, "image": photo(90, 70), **SMALL, **SHORT, "guidance_scale_2": 2.0}, variant="2.2"),
        Case(
            "2.2, last image",
            {"prompt": CAT, "image": photo(90, 70), "last_image": photo(50, 70), **SMALL, **SHORT, "num_frames": 13},
            variant="2.2",
        ),
        Case(
            "TI2V-5B",
            {"prompt": CAT, "image": photo(90, 70), **SMALL, **SHORT, "height": 64, "width": 96, "num_frames": 9},
            variant="ti2v",
        ),
    ),
    load_reference=load_reference,
    default_size=signature_size,
)

DMD = DMDRecipe(
    "WanDMDPipeline",
    build_dmd,
    cases=(
        Case("FastWan", {"prompt": CAT, **SMALL, **SHORT, "num_inference_steps": 3}),
        Case("80x32, 9 frames, own timesteps", {"prompt": MAP, **TALL, "timesteps": [990, 800, 600], "seed": 7}),
        Case("two prompts, n=2", {"prompt": [CAT, MAP], "n": 2, **TALL, **SHORT, "seed": 5}),
        Case(
            "TI2V-5B",
            {"prompt": MAP, **SHORT, "height": 64, "width": 96, "num_frames": 5},
            variant="ti2v",
        ),
    ),
    load_reference=DMDReference,
    default_size=signature_size,
    silent={"num_inference_steps": "it is the number of timesteps, and nothing else"},
    has_solver=False,
)

RECIPES = (WAN, IMAGE_TO_VIDEO, DMD)
logging.set_verbosity_error()
