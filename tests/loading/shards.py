"""Where a component's checkpoint lies, whole and in shards."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def weights(folder, component):
    return folder / component / f"{STEMS[component]}.safetensors"


def index_of(folder, component):
    return folder / component / f"{STEMS[component]}.safetensors.index.json"


def shard(folder, component):
    """Cut a component's checkpoint into two shards, as the libraries do, and return their names."""
    whole = weights(folder, component)
    tensors = load_file(whole)
    keys = sorted(tensors)
    names = [f"{STEMS[component]}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = (keys[: len(keys) // 2], keys[len(keys) // 2 :])
    for name, half in zip(names, halves, strict=True):
        save_file({key: tensors[key] for key in half}, whole.with_name(name), metadata={"format": "pt"})
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index_of(folder, component).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    whole.unlink()
    return names
