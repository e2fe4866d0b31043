"""A network of zeros looks as the loaded one, and takes little memory."""

from __future__ import annotations

from typing import Any

import torch

from safelight import ServerArgs
from safelight.loading.blank_network import blank_network
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from tests.acceleration import packages


def names_and_forms(module):
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {
        name: (tensor.shape, tensor.dtype, tensor.stride(), tensor.requires_grad) for name, tensor in tensors.items()
    }


def test_it_has_the_tensors_that_are_loaded(tmp_path):
    """Buffers have their values; blocks whose weights look alike have theirs in common, and the last one does not."""
    args = ServerArgs(str(packages.build("StableDiffusion3Pipeline", tmp_path)), device="cpu", dtype="bfloat16")
    loaded = load_pipeline(args).get_module("transformer")
    dtypes = {name: str(form[1]).removeprefix("torch.") for name, form in names_and_forms(loaded).items()}
    blank: Any = blank_network(args, open_repository(args.model), "transformer", dtypes)
    assert names_and_forms(blank) == names_and_forms(loaded)
    assert all(not parameter.any() for name, parameter in blank.named_parameters() if name.startswith("trans"))
    first, second, *_, last = blank.transformer_blocks
    assert first.attn.to_q.weight is second.attn.to_q.weight is last.attn.to_q.weight
    assert first.attn.to_q.weight is not first.attn.to_k.weight
    assert torch.equal(blank.pos_embed.pos_embed, loaded.pos_embed.pos_embed)
