"""Safetensors checkpoints: memory-mapped, strict, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safelight.acceleration.memory import carrier
from safelight.errors import CheckpointError, ModelError, ModelIndexError
from safelight.loading.files import name_of, read_json
from safelight.loading.headers import check_header
from safelight.loading.variants import STEMS, heads
from safelight.parallel.shards import Shard

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NAMED = 5
"""Keys that a message names before it counts the rest."""


def checkpoint_files(folder: Path, stems: Sequence[str] = STEMS, variant: str | None = None) -> list[Path]:
    """Return the shards of a component's checkpoint, each checked to be a whole safetensors file.

    Args:
        folder: the component's.
        stems: names of a checkpoint, without ending; the first that is there is taken.
        variant: of the checkpoint, such as `fp16`.

    Raises:
        CheckpointError: if a shard is missing or damaged, the index names a file elsewhere, or there is only pickle.

    """
    where = folder.name
    found = [folder / name for stem in stems for name in heads(stem, variant) if (folder / name).is_file()]
    if not found:
        if any(path.suffix in PICKLES for path in folder.glob("*")):
            raise CheckpointError(f"{where}: a pickle checkpoint is refused; convert it to safetensors")
        raise CheckpointError(f"{where}: no weights there ({' or '.join(heads(stem, variant)[-1] for stem in stems)})")
    head = found[0]
    files = [head] if head.suffix == ".safetensors" else [folder / name for name in _shard_names(head)]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{where}: shard {path.name} is missing")
        with _opened(path):
            pass
    return files


def load_weights(
    module: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    shards: Mapping[str, Shard] | None = None,
    variant: str | None = None,
) -> None:
    """Give a module that was built on the meta device its weights, in place.

    Two tables of its class, named as in Diffusers, may say more: parts of keys in `_keep_in_fp32_modules` are float32
    whatever the rest is, and keys with a part in `_keys_to_ignore_on_load_unexpected` are left in the file.

    On the CPU, in the checkpoint's own dtype, parameters are the mapped file itself: nothing is copied, and pages are
    read when they are first touched. What must not lie where the file has it is moved later (`alignment.py`).

    Args:
        module: whose parameters are filled.
        folder: the component's.
        dtype: of the weights.
        device: where they go.
        shards: of tensors that are on several ranks, what this one has, by key: nothing else of them is read.
        variant: of the checkpoint, such as `fp16`.

    Raises:
        CheckpointError: if a key is missing, unexpected or of another shape; it names them.
        ModelError: if the module has a tensor that no checkpoint fills; it names it.

    """
    module.requires_grad_(False)
    exact = float32_parts(type(module))
    unused = frozenset(vars(type(module)).get("_keys_to_ignore_on_load_unexpected", ()))
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    floating = {name for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    divided = shards or {}
    expected |= {key: shard.full_shape for key, shard in divided.items()}
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        there = stack.enter_context(carrier(device))
        for path in checkpoint_files(folder, variant=variant):
            file = stack.enter_context(_opened(path))
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                parts = frozenset(key.split("."))
                if parts & unused:
                    continue
                _check_key(key, file, expected, state, path)
                tensor, own = _read(file, key, divided.get(key)), torch.float32 if parts & exact else dtype
                if tensor.is_floating_point() is not (key in floating):
                    raise CheckpointError(f"{name_of(path)}: {key!r} is of {tensor.dtype}, which the model's is not")
                state[key] = there.bring(tensor, own if tensor.is_floating_point() else tensor.dtype)
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise CheckpointError(f"{folder.name}: missing {listed(missing)}")
    module.load_state_dict(state, assign=True)
    _check_filled(module, folder.name)


def _check_filled(module: nn.Module, where: str) -> None:
    """Refuse a table that was made in `__init__`: on the meta device it has no values, and no checkpoint has it."""
    for name, submodule in module.named_modules():
        tensors = {**vars(submodule), **dict(submodule.named_buffers(recurse=False))}
        for attribute, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                place = ".".join(filter(None, (where, name, attribute)))
                raise ModelError(
                    f"{place}: a tensor that {type(submodule).__name__} makes in __init__ and the checkpoint does not "
                    "have is without values, because modules are built without weights; make it in forward, or in "
                    "prepare_cond as an argument"
                )


def float32_parts(cls: type[nn.Module]) -> frozenset[str]:
    """Return the parts of keys that a class keeps in float32 whatever the rest is."""
    found = (vars(base).get("_keep_in_fp32_modules") for base in cls.__mro__)
    return frozenset(next((parts for parts in found if parts), ()))


def _read(file: Any, key: str, shard: Shard | None) -> Tensor:
    """Return a tensor, or this rank's shard of it."""
    if shard is None:
        whole: Tensor = file.get_tensor(key)
        return whole
    return shard.read(file.get_slice(key)) if shard.pieces else torch.zeros(shard.full_shape)


def _check_key(key: str, file: Any, expected: dict[str, tuple[int, ...]], seen: dict[str, Tensor], path: Path) -> None:
    where = name_of(path)
    if key not in expected:
        raise CheckpointError(f"{where}: unexpected key {key!r}")
    if key in seen:
        raise CheckpointError(f"{where}: key {key!r} is in two shards")
    shape = tuple(file.get_slice(key).get_shape())
    if shape != expected[key]:
        raise CheckpointError(f"{where}: {key!r} has shape {list(shape)}; the model takes {list(expected[key])}")


def _shard_names(index: Path) -> list[str]:
    where = name_of(index)
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ModelIndexError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not a safetensors index") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: shard {name!r} is refused; a shard is a safetensors file beside the index")
    return names


def _opened(path: Path) -> Any:
    """Open a safetensors file, mapped. The library checks offsets and length."""
    check_header(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{name_of(path)}: not a whole safetensors file ({error})") from error


def listed(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
