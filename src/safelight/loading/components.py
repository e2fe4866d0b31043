"""One component: from its class name in `model_index.json`, through tables of ours alone, to a loaded object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from safelight.acceleration.memory import carrier
from safelight.core.registry import resolve_class
from safelight.errors import CheckpointError, ModelError, ModelIndexError, nearest
from safelight.loading.bounds import bounded, check_numbers
from safelight.loading.checkpoint import checkpoint_files, float32_parts, listed, load_weights
from safelight.loading.repository import Repository, read_json
from safelight.parallel.plans import tensor_plan
from safelight.parallel.tensor import shard_parameters

LIBRARY_CLASSES: Mapping[str, str] = {
    "AutoencoderKL": "diffusers:AutoencoderKL",
    "AutoencoderKLQwenImage": "diffusers:AutoencoderKLQwenImage",
    "CLIPImageProcessor": "transformers:CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "transformers:CLIPImageProcessorPil",
    "CLIPImageProcessorPil": "transformers:CLIPImageProcessorPil",
    "CLIPTextModel": "transformers:CLIPTextModel",
    "CLIPTokenizer": "transformers:CLIPTokenizer",
    "CLIPTokenizerFast": "transformers:CLIPTokenizer",
    "CLIPVisionModel": "transformers:CLIPVisionModel",
    "FlowMatchEulerDiscreteScheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
    "Qwen2Tokenizer": "transformers:Qwen2Tokenizer",
    "Qwen2TokenizerFast": "transformers:Qwen2Tokenizer",
    "Qwen2VLProcessor": "transformers:Qwen2VLImageProcessorPil",
    "T5EncoderModel": "transformers:T5EncoderModel",
    "T5Tokenizer": "transformers:T5Tokenizer",
    "T5TokenizerFast": "transformers:T5Tokenizer",
    "UMT5EncoderModel": "transformers:UMT5EncoderModel",
    "UniPCMultistepScheduler": "diffusers:UniPCMultistepScheduler",
}
"""Components that the libraries load: class name in the index to `library:Class`."""

UNUSED_KEYS = frozenset({"lm_head.weight"})
"""A language model's head, which makes words: a family that needs only its hidden states loads it without."""

LIBRARY_STEMS: Mapping[str, str] = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of the checkpoint, without ending, that each library reads."""

LIBRARY_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What the libraries raise for a configuration or a file that is not as they expect."""

MAX_REASON = 300
"""Characters of a library's message that ours repeats."""


def component_target(repository: Repository, component: str, own: Mapping[str, str]) -> str | None:
    """Return `module:Class` of a component; None where the index has none.

    Args:
        repository: where it is.
        component: its name.
        own: the family's own classes.

    Raises:
        ModelIndexError: for a class that is in neither table.

    """
    class_name = repository.component_class_name(component)
    if class_name is None:
        return None
    table = {**LIBRARY_CLASSES, **own}
    if class_name not in table:
        raise ModelIndexError(
            f"model_index.json: {component}: class {class_name!r} is not supported; {nearest(class_name, table)}"
        )
    return table[class_name]


def library_of(target: str) -> str | None:
    """Return which library a class is of; None for our own."""
    package = target.partition(":")[0]
    return package if package in LIBRARY_STEMS else None


def load_component(
    folder: Path, target: str, dtype: torch.dtype, device: torch.device, share: tuple[int, int] = (0, 1)
) -> Any:
    """Load one component.

    Args:
        folder: the component's folder.
        target: `module:Class`, from the tables.
        dtype: of its weights.
        device: where they go.
        share: this rank and the number of ranks that share the weights of a model with a tensor-parallel plan.

    Raises:
        ModelError: if it cannot be loaded.

    """
    library = library_of(target)
    cls = resolve_class(target)
    if library is None:
        return _load_native(cls, folder, dtype, device, share)
    with in_words(f"{folder.name}: {cls.__name__}"), quiet():
        if issubclass(cls, nn.Module):
            return _load_library_module(cls, folder, dtype, device, LIBRARY_STEMS[library])
        if library == "diffusers":
            check_numbers(read_json(folder / cls.config_name), f"{folder.name}/{cls.config_name}")
        return cls.from_pretrained(folder, local_files_only=True)


def empty_component(folder: Path, target: str, dtype: torch.dtype) -> nn.Module:
    """Return a module as `load_component` would load it, on the meta device: from its JSON alone.

    Raises:
        ModelError: if it cannot be built.

    """
    cls = resolve_class(target)
    if library_of(target) is None:
        module = _build_native(cls, folder)
        kept = float32_parts(cls)
        state = {
            key: tensor.to(torch.float32 if kept & frozenset(key.split(".")) else dtype)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)
    with in_words(f"{folder.name}: {cls.__name__}"), quiet(), torch.device("meta"), bounded(folder.name):
        if library_of(target) == "transformers":
            built: nn.Module = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
        else:
            built = cls.from_config(cls.load_config(folder, local_files_only=True))
    # Half precision alone has exceptions, in the text encoders that would overflow.
    exceptions = float32_parts(cls) if dtype == torch.float16 else frozenset()
    for name, parameter in built.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exceptions & frozenset(name.split(".")) else dtype)
    return built.eval().requires_grad_(False)


def check_library_files(folder: Path, stem: str) -> None:
    """Refuse weights that a library would read from elsewhere, or from anything but whole safetensors files.

    Args:
        folder: a component's.
        stem: name of the checkpoint, without ending, that the library reads.

    Raises:
        ModelError: naming the file.

    """
    checkpoint_files(folder, (stem,))
    if "transformers_weights" in read_json(folder / "config.json"):
        raise ModelIndexError(
            f"{folder.name}/config.json: transformers_weights is refused; weights are {stem}.safetensors"
        )


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turn what a library raises while it loads `what` into a `ModelError`."""
    try:
        yield
    except LIBRARY_FAULTS as error:
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise ModelError(f"{what} cannot be loaded: {reason}") from error


def _load_native(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, share: tuple[int, int]) -> nn.Module:
    module = _build_native(cls, folder)
    shards = shard_parameters(module, *share) if tensor_plan(module) is not None else {}
    load_weights(module, folder, dtype, device, shards)
    return module.eval()


def _build_native(cls: Any, folder: Path) -> nn.Module:
    """Build one of our modules on the meta device."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    try:
        with torch.device("meta"), bounded(folder.name):
            module: nn.Module = cls.from_config(config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelIndexError(f"{folder.name}/config.json: {' '.join(str(error).split())[:MAX_REASON]}") from error
    return module


def _load_library_module(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device, stem: str) -> nn.Module:
    check_library_files(folder, stem)
    # Diffusers asks for another package, loudly, unless it is told to do without its deferred initialisation.
    details = {"low_cpu_mem_usage": False} if cls.__module__.startswith("diffusers") else {}
    with bounded(folder.name, checkpoint_files(folder, (stem,))):
        module, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in `info`, by name, and refused below
            output_loading_info=True,
            **details,
        )
    info["unexpected_keys"] = set(info["unexpected_keys"]) - UNUSED_KEYS
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{folder.name}: {fault.replace('_', ' ')}: {listed(sorted(map(str, info[fault])))}")
    carrier(device).bring_module(module)
    loaded: nn.Module = module.eval().requires_grad_(False)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars and reports: what they would warn of is an error here, or of no matter."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    bars, levels = transformers_logging.is_progress_bar_enabled(), [log.get_verbosity() for log in logs]
    transformers_logging.disable_progress_bar()
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
