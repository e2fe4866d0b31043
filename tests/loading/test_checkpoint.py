"""Weights are read strictly, from safetensors alone, and are those that Diffusers reads."""

from __future__ import annotations

import io
import json
import struct
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from safelight import ServerArgs
from safelight.errors import CheckpointError, ModelError, ModelIndexError
from safelight.loading.alignment import ALIGNMENT
from safelight.loading.checkpoint import checkpoint_files, load_weights
from safelight.loading.loader import load_pipeline
from safelight.testing.suites.alignment import lay
from tests.loading.conftest import edit_json
from tests.loading.shards import STEMS, index_of, shard, weights


def load(folder, **settings):
    return load_pipeline(ServerArgs(str(folder), device="cpu", **settings))


def refusal(folder, error=CheckpointError):
    """Return the one line with which a model is refused."""
    with pytest.raises(error) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_header(content, change):
    """Return a safetensors file's bytes with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def with_duplicate(content):
    """Return a safetensors file's bytes with a second entry of the first key, which is another tensor's."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    encoded = f"{json.dumps(header)[:-1]}, {json.dumps(first)}: {json.dumps(header[second])}}}".encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def overlap(header):
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


def pickled(content):
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


DAMAGE = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "truncated": lambda content: content[:-100],
    "trailing bytes": lambda content: content + b"\0" * 8,
    "header length 2**63": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "header no JSON": lambda content: content[:8] + b"x" + content[9:],
    "overlapping offsets": lambda content: with_header(content, overlap),
    "duplicate key": with_duplicate,
    "pickle": pickled,
}


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_refused(damaged, component, damage):
    path = weights(damaged, component)
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(damaged).startswith(f"{component}/{path.name}: not a whole safetensors file")


@pytest.mark.parametrize("component", STEMS)
def test_missing_and_pickle_checkpoints_are_refused(damaged, component):
    path = weights(damaged, component)
    path.unlink()
    assert refusal(damaged) == f"{component}: no weights there ({refusal_names(component)})"
    path.with_suffix(".bin").write_bytes(pickled(b""))
    assert refusal(damaged) == f"{component}: a pickle checkpoint is refused; convert it to safetensors"


def refusal_names(component):
    names = ["diffusion_pytorch_model", "model"] if component == "transformer" else [STEMS[component]]
    return " or ".join(f"{name}.safetensors" for name in names)


def rewrite(folder, component, change):
    path = weights(folder, component)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def some_key(tensors):
    return next(key for key in sorted(tensors) if key.endswith("weight") and tensors[key].ndim == 2)


def drop(tensors):
    tensors.pop(some_key(tensors))


def add(tensors):
    tensors["surplus.weight"] = torch.zeros(2)


def grow(tensors):
    key = some_key(tensors)
    tensors[key] = torch.zeros(tensors[key].shape[0] + 1, tensors[key].shape[1])


CHANGES = {"missing": drop, "unexpected": add, "shape": grow}


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_key_is_used_once(damaged, component, change):
    key = "surplus.weight" if change == "unexpected" else some_key(load_file(weights(damaged, component)))
    rewrite(damaged, component, CHANGES[change])
    message = refusal(damaged)
    assert message.startswith(component) and key in message
    assert change in message or "mismatched" in message


def test_many_missing_keys_are_counted(damaged):
    rewrite(damaged, "transformer", lambda tensors: [tensors.pop(key) for key in sorted(tensors)[:12]])
    assert refusal(damaged).endswith(" and 7 more")


def test_buffers_that_older_checkpoints_hold_are_no_surplus(damaged):
    """Many CLIP checkpoints hold position ids, which the model computes itself."""
    position_ids = torch.arange(16)[None]
    rewrite(
        damaged, "text_encoder", lambda tensors: tensors.update({"text_model.embeddings.position_ids": position_ids})
    )
    load(damaged)


@pytest.mark.parametrize("component", STEMS)
def test_shards(damaged, checkpoints, component):
    shard(damaged, component)
    assert_same_tensors(
        load(damaged).get_module(component), load(checkpoints.folder()).get_module(component).state_dict()
    )


def assert_same_tensors(module, expected):
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert [key for key in state if not torch.equal(state[key], expected[key])] == []


@pytest.mark.parametrize("component", STEMS)
def test_a_shard_that_is_missing_or_damaged(damaged, component):
    names = shard(damaged, component)
    second = damaged / component / names[1]
    second.write_bytes(second.read_bytes()[:-4])
    assert refusal(damaged).startswith(f"{component}/{names[1]}: not a whole safetensors file")
    second.unlink()
    assert refusal(damaged) == f"{component}: shard {names[1]} is missing"


def test_a_key_in_two_shards(damaged):
    names = shard(damaged, "transformer")
    first, second = (damaged / "transformer" / name for name in names)
    tensors = load_file(first)
    key = min(tensors)
    save_file({**load_file(second), key: tensors[key]}, second)
    assert refusal(damaged) == f"transformer/{names[1]}: key {key!r} is in two shards"


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("name", ["../x.safetensors", "ABSOLUTE", "sub/x.safetensors", "x.bin"])
def test_an_index_names_only_safetensors_beside_it(damaged, tmp_path, component, name):
    """The file that it names is there, whole, and right: it is refused for where it is."""
    names = shard(damaged, component)
    first = damaged / component / names[0]
    name = str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name
    (damaged / component / "sub").mkdir()
    (damaged / component / name).write_bytes(first.read_bytes())
    path = index_of(damaged, component)
    path.write_text(path.read_text().replace(json.dumps(names[0]), json.dumps(name)))
    assert f"shard {name!r} is refused" in refusal(damaged)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 7, "y": "z"}}', "[" * 100_000]
)
def test_an_index_that_is_none(damaged, content):
    shard(damaged, "transformer")
    index_of(damaged, "transformer").write_text(content)
    assert refusal(damaged) == "transformer/diffusion_pytorch_model.safetensors.index.json: not a safetensors index"


@pytest.mark.parametrize(("component", "decoy"), [("text_encoder", "diffusion_pytorch_model"), ("vae", "model")])
def test_a_checkpoint_of_the_other_librarys_name_hides_nothing(damaged, tmp_path, component, decoy):
    """What is checked is what the library reads."""
    names = shard(damaged, component)
    (damaged / component / f"{decoy}.safetensors").write_bytes((damaged / component / names[0]).read_bytes())
    outside = tmp_path / "outside.safetensors"
    (damaged / component / names[0]).rename(outside)
    path = index_of(damaged, component)
    path.write_text(path.read_text().replace(names[0], f"../../{outside.name}"))
    assert "outside.safetensors' is refused" in refusal(damaged)


def test_a_configuration_does_not_name_weights(damaged):
    edit_json(damaged / "text_encoder" / "config.json", transformers_weights="adapter_model.bin")
    assert "transformers_weights is refused" in refusal(damaged, ModelIndexError)


@pytest.mark.parametrize("variant", ["dev", "schnell", "kontext"])
def test_weights_are_those_that_diffusers_reads(checkpoints, variant):
    folder = checkpoints.folder(variant)
    index = json.loads((folder / "model_index.json").read_text())
    reference = getattr(diffusers, index["_class_name"]).from_pretrained(folder)
    pipeline = load(folder)
    for component in STEMS:
        assert_same_tensors(pipeline.get_module(component), getattr(reference, component).state_dict())


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


def test_a_component_has_its_own_dtype(checkpoints):
    pipeline = load(checkpoints.folder(), dtype="bfloat16", component_dtypes={"vae": "float32"})
    assert dtypes(pipeline.get_module("vae")) == {torch.float32}
    assert dtypes(pipeline.get_module("transformer")) == {torch.bfloat16}
    assert dtypes(pipeline.get_module("text_encoder")) == {torch.bfloat16}
    reference = diffusers.FluxTransformer2DModel.from_pretrained(
        checkpoints.folder() / "transformer", torch_dtype=torch.bfloat16
    )
    assert_same_tensors(pipeline.get_module("transformer"), reference.state_dict())


def mapped(path):
    """Return the address ranges at which a file is mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(f" {path}")]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def begins(path):
    """Return the byte of the file at which each tensor begins."""
    content = path.read_bytes()
    begun = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:begun])
    return {key: begun + entry["data_offsets"][0] for key, entry in entries.items() if key != "__metadata__"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [0, 8, 32])
def test_weights_are_the_mapped_file(damaged, stored, dtype, shift):
    """Nothing is copied but what is cast, and what is float32 and lies across the boundary in the file."""
    path = weights(damaged, "transformer")
    save_file({key: tensor.to(stored) for key, tensor in load_file(path).items()}, path)
    lay(path, shift)
    transformer, own = load(damaged, dtype=dtype).get_module("transformer"), getattr(torch, dtype)
    spans, places, stays = mapped(path), begins(path), set()
    for name, parameter in transformer.named_parameters():
        is_mapped = any(parameter.data_ptr() in span for span in spans)
        assert is_mapped == (stored == own and (own == torch.bfloat16 or places[name] % ALIGNMENT == 0)), name
        assert own == torch.bfloat16 or parameter.data_ptr() % ALIGNMENT == 0
        stays.add(is_mapped)
    assert (True in stays) == (stored == own and (own == torch.bfloat16 or shift == 0))


class Tabled(nn.Module):
    """A module that makes a table where no values are made."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        table = torch.arange(4.0)
        if kept == "buffer":
            self.linear.register_buffer("table", table, persistent=False)
        elif kept == "attribute":
            self.linear.table = table


@pytest.mark.parametrize("kept", ["buffer", "attribute", "nowhere"])
def test_a_table_made_in_init_is_refused_by_name(tmp_path, kept):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(dict(Tabled("nowhere").state_dict()), folder / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        module = Tabled(kept)
    if kept == "nowhere":
        load_weights(module, folder, torch.float32, torch.device("cpu"))
        return
    with pytest.raises(ModelError, match=r"transformer\.linear\.table: a tensor that Linear makes in __init__"):
        load_weights(module, folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "a/x.safetensors", "/proc/self/mem", 7, "x.bin", ""])
def test_an_index_names_files_beside_itself(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is refused"):
        checkpoint_files(tmp_path)
