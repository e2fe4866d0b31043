"""Tensor parallelism: what a rank reads and keeps, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from safelight.core.registry import resolve_class
from safelight.errors import CheckpointError, InvalidParameterError
from safelight.loading import checkpoint
from safelight.loading.checkpoint import load_weights
from safelight.loading.files import read_json
from safelight.parallel.plans import matching, tensor_plan
from safelight.parallel.tensor import parse_style, shard_parameters

TRANSFORMERS = {
    "flux": "safelight.families.flux.transformer:FluxTransformer2DModel",
    "qwen_image": "safelight.families.qwen_image.transformer:QwenImageTransformer2DModel",
    "wan": "safelight.families.wan.transformer:WanTransformer3DModel",
}
CPU = torch.device("cpu")


def on_meta(family, **config):
    with torch.device("meta"):
        return resolve_class(TRANSFORMERS[family]).from_config(config)


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_half_of_a_published_transformer_is_on_each_of_two_ranks(family):
    """With the numbers of the published models, which are the defaults."""
    whole, half = on_meta(family), on_meta(family)
    shards = shard_parameters(half, 0, 2)
    assert num_parameters(half) <= 0.55 * num_parameters(whole)
    assert all(shards[name].full_shape == tuple(whole.get_parameter(name).shape) for name in shards)


def test_every_entry_of_a_plan_names_a_module():
    """A misspelled name would leave weights whole."""
    for family, config in (("flux", {}), ("qwen_image", {}), ("wan", {"image_dim": 1280, "added_kv_proj_dim": 5120})):
        module = on_meta(family, num_layers=1, **config)
        plan = tensor_plan(module)
        assert plan is not None
        for pattern, style in plan.items():
            assert parse_style(style) and list(matching(module, pattern)), pattern


def test_a_rank_reads_its_shards_and_nothing_else(folders, monkeypatch):
    folder = folders("FluxPipeline") / "transformer"
    whole = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = read_json(folder / "config.json")
    read: list[int] = []
    parts = []
    monkeypatch.setattr(checkpoint, "_opened", counting(checkpoint._opened, read))
    for rank in range(2):
        read.clear()
        module = on_meta("flux", **{name: value for name, value in config.items() if not name.startswith("_")})
        shards = shard_parameters(module, rank, 2)
        load_weights(module, folder, torch.float32, CPU, shards)
        zeros = sum(module.get_parameter(name).numel() for name, shard in shards.items() if not shard.pieces)
        assert sum(read) == 4 * (num_parameters(module) - zeros)
        assert sum(read) < 0.6 * sum(tensor.nbytes for tensor in whole.values())  # of a model as small as this
        parts.append((dict(module.named_parameters()), shards))
    for name, full in whole.items():
        first, second = (named[name] for named, _ in parts)
        if name not in parts[0][1]:
            assert torch.equal(first, full) and torch.equal(second, full)
        elif name.endswith("bias") and first.shape == full.shape:
            assert torch.equal(first, full) and not second.any(), "the bias is in the sum once"
        else:
            assert torch.equal(rejoined(name, first, second, full), full)


def rejoined(name, first, second, full):
    if first.shape[0] < full.shape[0]:
        return torch.cat((first, second))
    if "single" not in name:
        return torch.cat((first, second), dim=1)
    width = full.shape[0] // 2  # attention first, the MLP behind it
    pieces = (first[:, :width], second[:, :width], first[:, width:], second[:, width:])
    return torch.cat(pieces, dim=1)


def counting(opened, read):
    """Return the opening of a file that notes the bytes that are read of it."""

    class Slice:
        def __init__(self, stored):
            self.stored = stored
            self.get_shape = stored.get_shape

        def __getitem__(self, places):
            tensor = self.stored[places]
            read.append(tensor.nbytes)
            return tensor

    class File:
        def __init__(self, path):
            self.file = opened(path)
            self.keys = self.file.keys

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, key):
            tensor = self.file.get_tensor(key)
            read.append(tensor.nbytes)
            return tensor

        def get_slice(self, key):
            return Slice(self.file.get_slice(key))

    return File


def test_a_tensor_of_another_shape_is_refused_though_its_shard_would_fit(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    save_file({"0.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    shards = shard_parameters(model, 0, 2, {"0": "column"})
    with pytest.raises(CheckpointError, match=r"shape \[6, 4\]; the model takes \[8, 4\]"):
        load_weights(model, tmp_path, torch.float32, CPU, shards)


def test_what_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(InvalidParameterError, match=r"tp_size: got 5; it takes a divisor of the 24 heads"):
        shard_parameters(on_meta("flux", num_layers=1, num_single_layers=1), 0, 5)
    with pytest.raises(InvalidParameterError, match=r"tp_size: got 4; it takes a divisor of the 6 channels of 0"):
        shard_parameters(nn.Sequential(nn.Linear(6, 6)), 0, 4, {"0": "column"})
    with pytest.raises(InvalidParameterError, match="Sequential has no tensor-parallel plan"):
        shard_parameters(nn.Sequential(nn.Linear(6, 6)), 0, 2)


@pytest.mark.parametrize("words", ["", "colwise", "row, gathered", "column of 1", "column of 1:1, gathered", 3])
def test_a_style_that_there_is_not_is_refused(words):
    with pytest.raises(ValueError, match=r"style|gathered"):
        parse_style(words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eps", [1e-6, None])
def test_a_norm_over_ranks_is_torch_s(pools, dtype, eps):
    differences = pools(2).run("norm_over_ranks", dtype=dtype, eps=eps)
    assert max(differences) < (1e-6 if dtype == "float32" else 1e-2)


def test_this_test_sees_a_norm_of_one_rank_s_channels(pools):
    assert max(pools(2).run("norm_over_ranks", dtype="float32", eps=1e-6, fault=True)) > 1e-3


def test_parts_of_one_weight_are_divided_each_by_itself(pools):
    assert max(pools(2).run("fused", parts="1:1:1")) < 1e-6
    assert max(pools(2).run("fused", parts="1:2")) > 1e-3


def test_a_language_model_is_divided_by_the_plan_of_its_library(pools, folders):
    differences = pools(2).run("text_encoder", folder=str(folders("QwenImagePipeline")))
    assert max(differences) < 1e-5


def test_a_plan_of_a_library_that_ranks_cannot_follow_is_none():
    from safelight.parallel.tensor import library_plan

    config = type("Config", (), {"base_model_tp_plan": {"layers.*": "colwise"}, "num_key_value_heads": 2})()
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    assert library_plan(model, 2) is None
    model.config = config
    assert library_plan(model, 2) == {"layers.*": "column"}
    assert library_plan(model, 4) is None
    model.config = SimpleNamespace()  # type: ignore[assignment]
    assert library_plan(model, 2) is None
