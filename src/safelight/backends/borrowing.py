"""A request's own copy of a pipeline: it shares the weights, and hands every call of a network to its driver."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safelight.backends.solvers import Steps, own_solver


@dataclass(frozen=True, eq=False)
class Handed:
    """A call of a network, on its way from a pipeline's copy to whoever makes it.

    Attributes:
        component: name of the network.
        method: of it, or of a part of it: `forward`, `decode`, `text_model.final_layer_norm.forward`.
        arguments: by name; those without one as a tuple, under `POSITIONAL`.
        context: of the network's caches, in which the call is made: a name, and pairs of further fields; None without.
        own: the request's own network, where it has changed something of the shared one.

    """

    component: str
    method: str
    arguments: dict[str, Any]
    context: tuple[Any, ...] | None = None
    own: nn.Module | None = None


Hand = Callable[[Handed], Any]
"""Has a call made, and returns the result."""

WHOLE = ("encode", "decode", "generate", "get_text_features", "get_image_features", "predict_num_frames")
"""What components do beside `forward` that is one call. Whatever else they do, their parts are handed over."""
POSITIONAL = "*"
"""The name under which arguments go that have none."""
CHANGES = (
    "set_attn_processor",
    "set_default_attn_processor",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
    "enable_freeu",
    "disable_freeu",
    "enable_tiling",
    "disable_tiling",
    "enable_slicing",
    "disable_slicing",
    "set_attention_backend",
    "reset_attention_backend",
    "_set_ar_attention",
)
"""What changes a network, but not its weights: a request that does it has a network of its own from there on."""
CONVERSIONS = ("to", "half", "float", "bfloat16")
"""What changes the weights."""


def borrowed(pipe: Any, hand: Hand, steps: Steps, device: torch.device, solver: Any = None) -> Any:
    """Return a shallow copy of a pipeline, whose networks are copies that hand their calls over.

    Nested pipelines are copied too, and what they share with the outer one they share in the copy. Solvers and guiders
    remember a step, and are copies of their own.

    Args:
        pipe: of the diffusers package.
        hand: has a call made.
        steps: counts the steps of the solvers.
        device: on which it runs, wherever its components lie.
        solver: in the place of its `scheduler`, wherever that is; None keeps it.

    """
    borrower = _Borrower(hand, steps, device)
    if solver is not None:
        borrower.replace(pipe.scheduler, own_solver(solver, steps))
    return borrower.pipeline(pipe, "")


def names_of_networks(pipe: Any, prefix: str = "") -> dict[str, nn.Module]:
    """Return every network of a pipeline, those of nested pipelines too, by the names that calls give them."""
    import diffusers

    found: dict[str, nn.Module] = {}
    for name, value in _parts(pipe):
        inner = {prefix + name: value} if isinstance(value, nn.Module) else {}
        if isinstance(value, diffusers.DiffusionPipeline):
            inner = names_of_networks(value, f"{prefix}{name}.")
        found.update({key: module for key, module in inner.items() if module not in found.values()})
    return found


def _parts(pipe: Any) -> list[tuple[str, Any]]:
    """Return what a pipeline holds, nested pipelines last: what they share has the outer one's name."""
    import diffusers

    return sorted(vars(pipe).items(), key=lambda part: isinstance(part[1], diffusers.DiffusionPipeline))


class _Borrower:
    def __init__(self, hand: Hand, steps: Steps, device: torch.device) -> None:
        self._hand, self._steps, self._device = hand, steps, device
        self._copies: dict[int, Any] = {}

    def replace(self, value: Any, other: Any) -> None:
        """Have another thing in the place of one."""
        self._copies[id(value)] = other

    def pipeline(self, pipe: Any, prefix: str) -> Any:
        copied = _shallow(pipe, _on_device(pipe.__class__))
        self._copies[id(pipe)] = copied
        for name, value in _parts(pipe):
            if id(value) not in self._copies:
                self._copies[id(value)] = self._copy(value, prefix + name)
            vars(copied)[name] = self._copies[id(value)]
        vars(copied)[_DEVICE] = self._device
        return copied

    def _copy(self, value: Any, name: str) -> Any:
        import diffusers
        import diffusers.guiders

        if isinstance(value, nn.Module):
            return self._network(value, name)
        if isinstance(value, diffusers.SchedulerMixin):
            return own_solver(value, self._steps)
        if isinstance(value, diffusers.guiders.BaseGuidance):
            return copy.deepcopy(value)
        return self.pipeline(value, f"{name}.") if isinstance(value, diffusers.DiffusionPipeline) else value

    def _network(self, module: nn.Module, component: str) -> nn.Module:
        return _Loan(module, component, self._hand, self._device).copied


class _Loan:
    """What a request has of a network: a copy of it that hands over its calls, and those of its parts.

    Attributes:
        copied: the copy.

    """

    def __init__(self, module: nn.Module, component: str, hand: Hand, device: torch.device) -> None:
        self._module, self._component, self._hand, self._device = module, component, hand, device
        self._own: nn.Module | None = None
        self._context: list[tuple[Any, ...]] = []
        cls = type(module)
        self.copied = handing(module, "", self._call)
        state = vars(self.copied)
        if "device" in dir(cls):  # as both packages' base classes have it
            self.copied.__class__ = _on_device(cls)  # type: ignore[arg-type]
            state[_DEVICE] = device
        for name in WHOLE:
            if name in dir(cls):
                state[name] = _method(getattr(cls, name), name, self._call)
        for name in CHANGES:
            if name in dir(cls):
                state[name] = functools.partial(self._change, name)
        for name in CONVERSIONS:
            state[name] = functools.partial(self._convert, name)
        if "cache_context" in dir(cls):
            state["cache_context"] = self._cache_context

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        context = self._context[-1] if self._context else None
        return self._hand(Handed(self._component, method, arguments, context, self._own))

    @contextlib.contextmanager
    def _cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        self._context.append((name, *fields.items()))
        try:
            yield
        finally:
            self._context.pop()

    def _change(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Change the request's own network, which has the shared one's weights."""
        return getattr(self._become_own(shares_weights=True), method)(*args, **kwargs)

    def _convert(self, method: str, *args: Any, **kwargs: Any) -> nn.Module:
        """Convert the weights of the request's own network; where they lie is not the request's to say."""
        given = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        dtype = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16}.get(method)
        dtype = dtype or (given[0] if given else None)
        tensors = itertools.chain(self._module.parameters(), self._module.buffers())
        if dtype is not None and any(each.is_floating_point() and each.dtype != dtype for each in tensors):
            self._become_own(shares_weights=False).to(self._device, dtype)
        return self.copied

    def _become_own(self, shares_weights: bool) -> nn.Module:
        if self._own is None or not shares_weights:
            tensors = itertools.chain(self._module.parameters(), self._module.buffers()) if shares_weights else ()
            now = self._module if self._own is None else self._own
            self._own = copy.deepcopy(now, {id(each): each for each in tensors})
            vars(self.copied)["_modules"] = _Parts(self._own._modules, "", self._call)
        return self._own


Call = Callable[[str, dict[str, Any]], Any]
"""Has a method of a network called, named by its path, with arguments by name."""


def handing(module: nn.Module, path: str, call: Call) -> nn.Module:
    """Return a shallow copy of a module whose call is handed over, and those of its parts."""
    copied: nn.Module = _shallow(module, type(module))
    state = vars(copied)
    state["_forward_hooks"], state["_forward_pre_hooks"] = {}, {}  # they run where the call is made
    state["_compiled_call_impl"] = None
    state["_modules"] = _Parts(module._modules, path, call)
    state["forward"] = _method(type(module).forward, f"{path}forward", call)
    return copied


class _Parts(dict[str, Any]):
    """A module's parts, by name each as a copy whose calls are handed over; taken all together they are as they are."""

    def __init__(self, modules: Mapping[str, nn.Module | None], path: str, call: Call) -> None:
        super().__init__(modules)
        self._path, self._call = path, call
        self._copies: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> Any:
        module = super().__getitem__(name)
        if module is None:
            return None
        if name not in self._copies:
            self._copies[name] = handing(module, f"{self._path}{name}.", self._call)
        return self._copies[name]


def _method(method: Callable[..., Any], name: str, call: Call) -> Callable[..., Any]:
    """Return what a method of a network is in the copy: its arguments, by their names, are handed over."""

    @functools.wraps(method)
    def handed(*args: Any, **kwargs: Any) -> Any:
        return call(name, by_name(method, args, kwargs))

    del handed.__wrapped__  # whoever looks at its arguments finds no `self`
    handed.__signature__ = _bound_signature(method)  # type: ignore[attr-defined]
    return handed


@functools.cache
def _bound_signature(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(frozen=True)
class _Parameters:
    """What a method takes, at hand: `Signature.bind` takes as long as half a thread's round trip.

    Attributes:
        names: of all that have one, in order.
        positional: of those that may come without.
        required: of those without a default.
        takes_others: whether it takes names that it does not know.
        is_plain: whether every argument can be given by a name.

    """

    names: tuple[str, ...]
    positional: tuple[str, ...]
    required: frozenset[str]
    takes_others: bool
    is_plain: bool


@functools.cache
def _parameters(method: Callable[..., Any]) -> _Parameters:
    each = list(_bound_signature(method).parameters.values())
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [parameter for parameter in each if parameter.kind not in unnamed]
    kinds = {parameter.kind for parameter in each}
    return _Parameters(
        tuple(parameter.name for parameter in named),
        tuple(parameter.name for parameter in named if parameter.kind is not inspect.Parameter.KEYWORD_ONLY),
        frozenset(parameter.name for parameter in named if parameter.default is inspect.Parameter.empty),
        inspect.Parameter.VAR_KEYWORD in kinds,
        inspect.Parameter.VAR_POSITIONAL not in kinds,
    )


def by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a method by their names, in its own order, those that were given.

    Raises:
        TypeError: if it cannot be called so.

    """
    takes = _parameters(method)
    given = {**dict(zip(takes.positional, args, strict=False)), **kwargs}
    known = {name: given[name] for name in takes.names if name in given}
    fits = len(given) == len(args) + len(kwargs) and takes.required <= known.keys()
    if takes.is_plain and fits and (takes.takes_others or len(known) == len(given)):
        return known if len(known) == len(given) else {**known, **given}
    bound = _bound_signature(method).bind(*args, **kwargs)  # says what does not fit
    kinds = [bound.signature.parameters[name].kind for name in bound.arguments]
    return {**kwargs, POSITIONAL: args} if inspect.Parameter.VAR_POSITIONAL in kinds else given


def _shallow(value: Any, cls: Any) -> Any:
    """Return a shallow copy of an object, of a class that is its own or extends it."""
    copied = cls.__new__(cls)
    vars(copied).update(vars(value))
    return copied


_DEVICE = "device_of_the_call"


class _OnDevice:
    """Of a copy of a pipeline or a network: where it runs, wherever weights lie while they are not used.

    The package takes the device of whichever component, or parameter, it finds first.
    """

    @property
    def device(self) -> torch.device:
        found: torch.device = vars(self)[_DEVICE]
        return found

    @property
    def _execution_device(self) -> torch.device:
        return self.device


@functools.cache
def _on_device(cls: type) -> type:
    return type(cls.__name__, (_OnDevice, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
