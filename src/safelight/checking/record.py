"""What a model makes on its way, by name: the same names on our side and on the reference's."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Kind(enum.Enum):
    """How much two recorded things must agree."""

    EXACT = "to the last bit"
    CLOSE = "within the tolerance"
    OUTPUT = "within the tolerance, in as many tokens as ours has: the reference may have more behind them"
    INNER = "as OUTPUT, and not at all where the output of the model call agrees: it is another form then"


@dataclass(frozen=True)
class Recorded:
    """Tensors of one name, one or what a module returns as a tuple, copied to the CPU."""

    tensors: tuple[Tensor, ...]
    kind: Kind


class Recorder:
    """Keeps what is made, in order; the second thing of a name is called `name, call 2`."""

    def __init__(self) -> None:
        self.entries: dict[str, Recorded] = {}
        self._counts: dict[str, int] = {}

    def add(self, what: str, *tensors: Tensor, kind: Kind = Kind.CLOSE) -> None:
        """Keep a copy of one thing."""
        count = self._counts[what] = self._counts.get(what, 0) + 1
        name = what if count == 1 else f"{what}, call {count}"
        self.entries[name] = Recorded(tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors), kind)


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors that a module returned: itself, or those of a tuple."""
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(entry for entry in values if isinstance(entry, Tensor))


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    return dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)


@contextmanager
def recording_encoders(recorder: Recorder, encoders: Mapping[str, nn.Module]) -> Iterator[None]:
    """Keep what each encoder of text or images is given, and what it returns, while the block runs.

    What an attention mask hides is left out: it may be padding on one side, and nothing on the other.
    """

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = arguments(module, args, kwargs)
            ids, mask = given.get("input_ids"), given.get("attention_mask")
            if ids is not None:
                seen = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
                recorder.add(f"{name}: token ids", ids[seen.bool()], kind=Kind.EXACT)
            if given.get("pixel_values") is not None:
                recorder.add(f"{name}: pixels", given["pixel_values"])
            states, pooled = output["last_hidden_state"], output.get("pooler_output")
            if ids is not None:
                states = states[seen.bool()]
            recorder.add(f"{name}: hidden states", states)
            if isinstance(pooled, Tensor):
                recorder.add(f"{name}: pooled", pooled)

        return record

    with ExitStack() as hooks:
        for name, encoder in encoders.items():
            # Inside a language model with a head, which one side may have and the other not.
            body = getattr(encoder, "base_model", encoder)
            hooks.enter_context(body.register_forward_hook(hook(name), with_kwargs=True))
        yield


@contextmanager
def recording_modules(recorder: Recorder, root: nn.Module, label: str, names: Iterable[str]) -> Iterator[None]:
    """Keep what the modules below `root` return in its first forward, and no more of it."""
    handles: list[RemovableHandle] = []

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            recorder.add(f"{label}.{name}", *tensors_of(output), kind=Kind.INNER)

        return record

    def stop(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        for handle in handles:
            handle.remove()

    modules = dict(root.named_modules())
    for name in names:
        if name in modules:
            handles.append(modules[name].register_forward_hook(hook(name)))
    handles.append(root.register_forward_hook(stop))
    try:
        yield
    finally:
        stop(root, (), None)


@contextmanager
def recording_calls(recorder: Recorder, root: nn.Module, label: str) -> Iterator[list[dict[str, Any]]]:
    """Keep what a model is given and what it returns while the block runs; yields the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(arguments(module, args, kwargs))
        for name, value in calls[-1].items():
            if isinstance(value, Tensor):
                recorder.add(f"{label}: {name}", value, kind=Kind.INNER)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        recorder.add(f"{label}: output", *tensors_of(output), kind=Kind.OUTPUT)

    with root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after):
        yield calls


def block_names(root: nn.Module) -> list[str]:
    """Return the names of a transformer's repeated blocks, and of its other direct children."""
    repeated = getattr(root, "_repeated_blocks", None) or ()
    blocks = [name for name, module in root.named_modules() if type(module).__name__ in repeated]
    children = [name for name, _ in root.named_children() if not any(block.startswith(f"{name}.") for block in blocks)]
    return blocks + children


def leaf_names(root: nn.Module, below: str) -> list[str]:
    """Return the names of the modules below one, or itself, that have no modules of their own."""
    return [
        name
        for name, module in root.named_modules()
        if (name == below or name.startswith(f"{below}.")) and not any(True for _ in module.children())
    ]


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Put `wrap(method)` in the place of an object's method while the block runs."""
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
