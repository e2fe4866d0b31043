"""Write the repository that ships with the package: Diffusers layout, float16 safetensors."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import FluxPipeline

from training.components import make_scheduler
from training.train_autoencoder import load_autoencoder
from training.train_transformer import Examples, make_modules

DEFAULTS = {"height": 128, "width": 128, "num_inference_steps": 16, "max_sequence_length": 32}


def build_pipeline(out: Path, name: str) -> FluxPipeline:
    """The pipeline of the averaged weights in `out`."""
    examples = Examples(out / "latents.safetensors", tokenizer_seed=0)
    modules = make_modules(examples)
    modules.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True)["average"])
    return FluxPipeline(
        scheduler=make_scheduler(),
        vae=load_autoencoder(out).to(memory_format=torch.contiguous_format),
        text_encoder=modules["text_encoder"].eval(),
        tokenizer=examples.clip_tokenizer,
        text_encoder_2=modules["text_encoder_2"].eval(),
        tokenizer_2=examples.t5_tokenizer,
        transformer=modules["transformer"].eval(),
    )


def export(pipeline: FluxPipeline, destination: Path) -> None:
    """Save into a temporary folder and move file by file: a reader never sees half a file."""
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as folder:
        temporary = Path(folder)
        pipeline.to(torch.float16).save_pretrained(temporary)
        (temporary / "generation_config.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
        shutil.copy(Path(__file__).parent / "model_card.md", temporary / "README.md")
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = destination / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.chmod(0o644)
                path.replace(target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoints are")
    parser.add_argument("--name", default="transformer", help="of the transformer's checkpoint")
    parser.add_argument("--destination", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    export(build_pipeline(arguments.out, arguments.name), arguments.destination)


if __name__ == "__main__":
    main()
