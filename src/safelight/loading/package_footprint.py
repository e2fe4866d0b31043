"""What a pipeline of the diffusers package needs for a request: its call is made with networks on the meta device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safelight.acceleration.activations import META, Valueless, on_host, on_meta
from safelight.acceleration.blocks import repeated_blocks
from safelight.backends import components, diffusers
from safelight.backends.borrowing import names_of_networks
from safelight.core.calls import ModelCall
from safelight.core.components import Components
from safelight.core.request import Req
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.core.trees import Tree
from safelight.errors import InvalidParameterError, SafelightError, in_one_line
from safelight.loading.components import empty_library_module, quiet
from safelight.loading.repository import Repository
from safelight.loading.vaes import package_vae

if TYPE_CHECKING:
    from safelight.loading.footprint import Peaks


LARGE, CUT = 2**24, 64
"""Elements of a tensor that stays on the meta device for the pipeline too, until the pipeline itself takes it away; and
the most of one of its dimensions that come then: all that follows is the host's work."""


def empty_package(
    repository: Repository, schema: ModelSchema, server_args: ServerArgs, in_bands: bool
) -> diffusers.DiffusersPipeline:
    """Return a pipeline of the package that is whole but for its networks' weights, which are on the meta device.

    Raises:
        ModelError: if it cannot be built.
        InvalidParameterError: if its VAE cannot be decoded in bands, and is to be.

    """
    given: dict[str, Any] = {}
    for name in repository.component_names():
        folder, dtype = repository.folder(name), server_args.component_dtype(name)
        cls = components.check_component(folder, name, repository.index[name])
        if components.checkpoint_stem(cls) is not None:
            given[name] = empty_library_module(cls, folder, dtype)
        elif name in repository.elsewhere or components.is_taken_apart(cls):
            given[name] = components.load_component(cls, folder, dtype, None)
    with quiet():
        pipe = diffusers.load(
            repository.path, repository.pipeline.pipeline_name, server_args, repository.variant, given
        )
    modules = names_of_networks(pipe)
    parts = Components({"pipeline": pipe, **modules}, vae=package_vae(modules, in_bands))
    return diffusers.assemble(parts, schema, server_args)


def rehearse_package(pipeline: diffusers.DiffusersPipeline, req: Req, peaks: Peaks) -> None:
    """Make a pipeline's call, its networks on the meta device and everything else on the host.

    Args:
        pipeline: its networks are on the meta device.
        req: the request.
        peaks: takes note of each call with what the pipeline makes of it, and of what cannot be streamed.

    Raises:
        InvalidParameterError: if it cannot be called so.

    """
    last: tuple[str, str] | None = None
    num_calls: Counter[tuple[str, str, int]] = Counter()

    def ask(call: ModelCall) -> Tree:
        nonlocal last
        if last is not None:
            peaks.record(req, *last)
        last = diffusers.stage_of(call.component, call.method), call.component
        num_calls[(*last, call.key.step)] += 1
        if call.method != "forward" and is_in_a_block(pipeline.get_module(call.component), call.method):
            peaks.undivided.add(call.component)
        with peaks.moving():
            kwargs = carried(dict(call.kwargs), on_meta)
        made = pipeline.forward(dataclasses.replace(call, kwargs=kwargs))
        peaks.record(req, *last)
        with peaks.moving():
            return carried(made, lambda tensor: on_host(tensor) if tensor.numel() <= LARGE else tensor)

    try:
        with LeavesCut(), torch.inference_mode(), watched(pipeline, peaks), quiet():
            pipeline.call_stage.call(req, ask)
    except SafelightError as error:
        takes = f"for a plan of memory one that runs without weights; this one does not: {in_one_line(error)}"
        raise InvalidParameterError("model", pipeline.schema.model, takes) from error
    if last is not None:
        peaks.record(req, *last)
    steps = [count for (stage, _, _), count in num_calls.items() if stage == diffusers.DENOISING]
    peaks.num_branches = max(steps, default=1)


class LeavesCut(Valueless):
    """Lets no large tensor leave the meta device whole: those are videos, of which no network sees any more."""

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return zeros."""
        cut = tensor.numel() > LARGE
        return torch.zeros([min(size, CUT) if cut else size for size in tensor.shape], dtype=tensor.dtype)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lay out no large tensor elsewhere either."""
        if func is Tensor.new_empty and math.prod(args[1]) > LARGE:
            return func(*args, device=META)
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def watched(pipeline: diffusers.DiffusersPipeline, peaks: Peaks) -> Any:
    """Note whose blocks are not all called as modules, where they would come to the device."""
    blocks = {name: repeated_blocks(module) for name, module in pipeline.denoisers().items()}
    called: set[nn.Module] = set()
    hooks = [
        block.register_forward_pre_hook(lambda module, _: called.add(module))
        for each in blocks.values()
        for block in each
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    peaks.undivided |= {name for name, each in blocks.items() if not called.issuperset(each)}


def is_in_a_block(module: nn.Module, method: str) -> bool:
    """Say whether a method, by its path, is of a part of one of a module's blocks."""
    part = module.get_submodule(method.rpartition(".")[0])
    return any(part is inner for block in repeated_blocks(module) for inner in block.modules() if inner is not block)


def carried(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """Return a copy of any objects, with each tensor in them changed, once however often they refer to it.

    Generators in a dict stay as they are.
    """
    values = tree.values() if isinstance(tree, dict) else ()
    with Carrying(change):
        return copy.deepcopy(tree, {id(value): value for value in values if isinstance(value, torch.Generator)})


class Carrying(TorchFunctionMode):
    """Changes tensors where they would be copied."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Change, or let torch."""
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = self._change(tensor)
        return memo[id(tensor)]
