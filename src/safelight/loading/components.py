"""One component: from its class name in `model_index.json`, through tables of ours alone, to a loaded object."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.acceleration.memory import carrier
from safelight.core.registry import resolve_class
from safelight.errors import CheckpointError, ModelError, ModelIndexError, SafelightError, in_one_line, shown
from safelight.loading.bounds import bounded
from safelight.loading.checkpoint import checkpoint_files, float32_parts, listed, load_weights
from safelight.loading.classes import WEIGHTS_FILES, Source, WeightsFile, library_of
from safelight.loading.files import read_json
from safelight.loading.trials import try_out
from safelight.parallel.plans import tensor_plan
from safelight.parallel.tensor import shard_parameters

logger = logging.getLogger(__name__)


def load_component(source: Source, dtype: torch.dtype, device: torch.device, share: tuple[int, int] = (0, 1)) -> Any:
    """Load one component.

    Args:
        source: its class, and where it lies.
        dtype: of its weights.
        device: where they go.
        share: this rank and the number of ranks that share the weights of a model with a tensor-parallel plan.

    Raises:
        ModelError: if it cannot be loaded.

    """
    folder, cls = source.folder, resolve_class(source.target)
    if library_of(source.target) is None:
        check_weights(folder, source.stems, source.variant)
        module = build_native(cls, folder)
        shards = shard_parameters(module, *share) if tensor_plan(module) is not None else {}
        load_weights(module, folder, dtype, device, shards, source.variant)
        return module.eval()
    with in_words(f"{folder.name}: {cls.__name__}"), quiet():
        if issubclass(cls, nn.Module):
            return _load_library_module(cls, source, dtype, device)
        loaded = cls.from_pretrained(folder, local_files_only=True)
        try_out(loaded, folder.name)
        return loaded


def empty_component(source: Source, dtype: torch.dtype) -> nn.Module:
    """Return a module as `load_component` would load it, on the meta device: from its JSON alone.

    Raises:
        ModelError: if it cannot be built.

    """
    cls = resolve_class(source.target)
    if library_of(source.target) is not None:
        return empty_library_module(cls, source.folder, dtype)
    return _as_loaded(build_native(cls, source.folder), dtype, float32_parts(cls))


def empty_library_module(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return a module of a library's class as the library loads it, on the meta device: from its JSON alone.

    Raises:
        ModelError: if it cannot be built.

    """
    import transformers

    exact = float32_parts(cls)
    with in_words(f"{folder.name}: {cls.__name__}"), quiet(), torch.device("meta"), bounded(folder.name):
        if issubclass(cls, transformers.PreTrainedModel):
            module = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
            if dtype != torch.float16:  # which they would overflow
                exact = frozenset()
        else:
            module = cls.from_config(cls.load_config(folder, local_files_only=True))
    return _as_loaded(module, dtype, exact)


def _as_loaded(module: nn.Module, dtype: torch.dtype, exact: frozenset[str]) -> nn.Module:
    """Give a module without weights its dtypes: parts whose names have one of these in them stay in float32."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if exact & frozenset(name.split(".")) else dtype)
    return module.to("meta").eval().requires_grad_(False)  # some make a tensor elsewhere, whatever the default is


def check_weights(folder: Path, stems: tuple[str, ...], variant: str | None) -> list[Path]:
    """Return the files of a component's weights, as checked as their configuration says nothing of others.

    Args:
        folder: a component's.
        stems: names of the checkpoint, without ending, that the library reads.
        variant: of the weights.

    Raises:
        ModelError: naming the file: weights elsewhere, weights that are not whole safetensors files, or quantised.

    """
    files = checkpoint_files(folder, stems, variant)
    where, config = f"{folder.name}/config.json", read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelIndexError(
            f"{where}: quantization_config: weights quantised by {shown(method)} are not loaded; "
            "take the model's repository with whole weights, in bfloat16 or float32"
        )
    return files


def warn_of_unused(folder: Path, cls: Any) -> None:
    """Log which settings of a component its class does not know: a newer writer's, which are left out.

    Args:
        folder: the component's.
        cls: its class, ours or of a library; those of transformers keep whatever they are given.

    """
    import diffusers
    import transformers

    unused: Iterable[str] = ()
    if issubclass(cls, diffusers.ConfigMixin):
        with quiet():
            unused = cls.extract_init_dict(_public(read_json(folder / cls.config_name)))[1]
    elif issubclass(cls, nn.Module) and not issubclass(cls, transformers.PreTrainedModel):
        config = _public(read_json(folder / "config.json"))
        unused = config.keys() - _known(cls, config).keys()
    for name in sorted(unused):
        logger.warning("%s: %s does not know %r in its configuration: left out", folder.name, cls.__name__, name)


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Turn what a library raises while it loads `what` into a `ModelError`."""
    try:
        yield
    except (SafelightError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the libraries' boundary: a panic of compiled code is no Exception
        raise ModelError(f"{what} cannot be loaded: {in_one_line(error)}") from error


def build_native(cls: Any, folder: Path) -> nn.Module:
    """Build one of our modules on the meta device, from what its class knows of the configuration.

    Raises:
        ModelIndexError: if it describes none.

    """
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"), bounded(folder.name):
            known = {name: tuple(v) if isinstance(v, list) else v for name, v in _known(cls, config).items()}
            module: nn.Module = cls.from_config(known)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelIndexError(f"{folder.name}/config.json: {in_one_line(error)}") from error
    return module


def _known(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one of our classes is built from: its architecture's fields, and whatever its reference takes.

    A setting that the reference knows, and we do not, changes its pictures: it is kept, and so refused.
    """
    import diffusers

    hints = typing.get_type_hints(cls.__init__).values()
    fields = {field.name for hint in hints if dataclasses.is_dataclass(hint) for field in dataclasses.fields(hint)}
    reference = getattr(diffusers, cls.__name__, None)
    known = fields | (inspect.signature(reference.__init__).parameters.keys() if reference is not None else set())
    return {name: value for name, value in _public(config).items() if name in known or not fields}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the model, and not of its writer."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _load_library_module(cls: Any, source: Source, dtype: torch.dtype, device: torch.device) -> nn.Module:
    folder, known = source.folder, WEIGHTS_FILES.get(source.target, WeightsFile())
    details: dict[str, Any] = {"key_mapping": dict(known.renamed)} if known.renamed else {}
    with bounded(folder.name, check_weights(folder, source.stems, source.variant)):
        module, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            variant=source.variant,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in `info`, by name, and refused below
            output_loading_info=True,
            **details,
        )
    faults = {name: set(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults["unexpected_keys"] = {key for key in faults["unexpected_keys"] if key.partition(".")[0] not in known.surplus}
    for part in source.optional_parts:
        own = {key for key in module.state_dict() if key.startswith(f"{part}.")}
        if own and own <= faults["missing_keys"]:
            faults["missing_keys"] -= own
            setattr(module, part, nn.Identity())
    for fault, keys in faults.items():
        if keys:
            raise CheckpointError(f"{folder.name}: {fault.replace('_', ' ')}: {listed(sorted(keys))}")
    with carrier(device) as there:
        there.bring_module(module)
    loaded: nn.Module = module.eval().requires_grad_(False)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars and reports: what they would warn of is an error here, or of no matter."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    bars, levels = [log for log in logs if log.is_progress_bar_enabled()], [log.get_verbosity() for log in logs]
    for log in logs:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()
