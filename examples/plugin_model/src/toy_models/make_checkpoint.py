"""`python -m toy_models.make_checkpoint FOLDER`: a tiny random checkpoint of each pipeline."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toy_models.transformer import ToyArchitecture, ToyTransformer2DModel

TEXT_LENGTH = 16
CHECKPOINTS = {"toy": "ToyPipeline", "toy-variation": "ToyVariationPipeline"}


def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of CLIP's kind whose tokens are single bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_LENGTH)


def library_components() -> dict[str, Any]:
    """Return the components that are not ours, by their names in the index."""
    tokens = tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=ToyArchitecture.text_dim,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": CLIPTextModel(text_config),
        "tokenizer": tokens,
        "vae": vae,
    }


def shake(module: nn.Module) -> None:
    """Move every parameter: norms at 1 and biases at 0 would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def write_checkpoint(folder: Path, pipeline_name: str) -> None:
    """Write one checkpoint in Diffusers layout."""
    torch.manual_seed(0)
    components = library_components()
    for name, component in components.items():
        if isinstance(component, nn.Module):
            shake(component)
        component.save_pretrained(folder / name)
    architecture = ToyArchitecture()
    transformer = ToyTransformer2DModel(architecture)
    shake(transformer)
    (folder / "transformer").mkdir()
    save_file(transformer.state_dict(), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(folder / "transformer" / "config.json", dataclasses.asdict(architecture))
    # The class is looked up in the pipeline's own table. Its library is one of the two that an index may name.
    index: dict[str, Any] = {"_class_name": pipeline_name, "transformer": ["diffusers", "ToyTransformer2DModel"]}
    for name, component in components.items():
        index[name] = [type(component).__module__.partition(".")[0], type(component).__name__]
    write_json(folder / "model_index.json", index)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write every checkpoint below the folder that the command line names, and name them."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m toy_models.make_checkpoint FOLDER")
    for name, pipeline_name in CHECKPOINTS.items():
        folder = Path(sys.argv[1]) / name
        write_checkpoint(folder, pipeline_name)
        print(folder)


if __name__ == "__main__":
    main()
