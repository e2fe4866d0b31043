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


@dataclass(frozen=True)
class RecordedCall:
    """One call of a model.

    Attributes:
        component: the model's name.
        number: which of its calls it is, from 1.
        step: the denoising step that it belongs to, from 0.
        arguments: as they were given, by name, so that the call can be made again.
        entries: what was kept of it: by `: name` an argument and `: output`, by `.name` what a module returned.

    """

    component: str
    number: int
    step: int
    arguments: Mapping[str, Any]
    entries: dict[str, Recorded]

    @property
    def num_rows(self) -> int:
        """The size of the batch dimension; 0 before it has returned."""
        made = self.entries.get(OUTPUT)
        return made.tensors[0].shape[0] if made is not None else 0

    def title(self, entry: str) -> str:
        """Return the name of an entry in a report."""
        return numbered(f"{self.component}{entry}", self.number)


OUTPUT = ": output"


def numbered(what: str, number: int) -> str:
    """Return the name of the thing of a number, from 1, among those of one name."""
    return what if number == 1 else f"{what}, call {number}"


class Recorder:
    """Keeps what is made, in order; the second thing of a name is called `name, call 2`.

    Attributes:
        entries: what was made, and the calls of models, in one order.
        calls: those calls alone.
        step: of the calls that are made now; whoever drives sets it.

    """

    def __init__(self) -> None:
        self.entries: dict[str, Recorded | RecordedCall] = {}
        self.calls: list[RecordedCall] = []
        self.step = 0
        self._counts: dict[str, int] = {}

    def add(self, what: str, *tensors: Tensor, kind: Kind = Kind.CLOSE) -> None:
        """Keep a copy of one thing."""
        self.entries[numbered(what, self._count(what))] = copied(tensors, kind)

    def begin_call(self, component: str, given: Mapping[str, Any]) -> None:
        """Keep a call's arguments; its output is added to it when it has returned."""
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        kept = {f": {name}": copied((tensor,), Kind.INNER) for name, tensor in tensors.items()}
        call = RecordedCall(component, self._count(component), self.step, given, kept)
        self.calls.append(call)
        self.entries[numbered(component, call.number)] = call

    def _count(self, what: str) -> int:
        count = self._counts[what] = self._counts.get(what, 0) + 1
        return count


def copied(tensors: Iterable[Tensor], kind: Kind) -> Recorded:
    """Return copies on the CPU."""
    return Recorded(tuple(tensor.detach().to("cpu", copy=True) for tensor in tensors), kind)


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
            states, pooled = output["last_hidden_state"], output.get("pooler_output")
            if given.get("pixel_values") is not None:
                recorder.add(f"{name}: pixels", given["pixel_values"])
            if ids is None:
                recorder.add(f"{name}: hidden states", states)
            else:
                seen = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
                for row, kept in enumerate(seen.bool()):  # one side may encode several texts in one call
                    recorder.add(f"{name}: token ids", ids[row][kept], kind=Kind.EXACT)
                    recorder.add(f"{name}: hidden states", states[row][kept])
            if isinstance(pooled, Tensor):
                for each in torch.split(pooled, 1):
                    recorder.add(f"{name}: pooled", each)

        return record

    with ExitStack() as hooks:
        for name, encoder in encoders.items():
            # Inside a language model with a head, which one side may have and the other not.
            body = getattr(encoder, "base_model", encoder)
            hooks.enter_context(body.register_forward_hook(hook(name), with_kwargs=True))
        yield


@contextmanager
def recording_calls(recorder: Recorder, component: str, root: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Keep what a model is given and what it returns, in each of its calls while the block runs.

    Args:
        recorder: keeps it.
        component: the model's name.
        root: the model.
        names: of modules below it, whose outputs are kept too in calls of the first step.

    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.begin_call(component, arguments(module, args, kwargs))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        recorder.calls[-1].entries[OUTPUT] = copied(tensors_of(output), Kind.OUTPUT)

    def inside(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if recorder.step == 0:
                recorder.calls[-1].entries[f".{name}"] = copied(tensors_of(output), Kind.INNER)

        return record

    modules = dict(root.named_modules())
    with ExitStack() as hooks:
        hooks.enter_context(root.register_forward_pre_hook(before, with_kwargs=True))
        for name in names:
            if name in modules:
                hooks.enter_context(modules[name].register_forward_hook(inside(name)))
        hooks.enter_context(root.register_forward_hook(after))
        yield


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
def recording_method(owner: Any, name: str, keep: Callable[..., None]) -> Iterator[None]:
    """Give what an object's method returns, and its arguments behind that, to `keep`, while the block runs."""
    method = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        made = method(*args, **kwargs)
        keep(made, *args, **kwargs)
        return made

    setattr(owner, name, recorded)
    try:
        yield
    finally:
        delattr(owner, name)
