"""Compiling in a process of its own, which fills Inductor's cache while this one answers requests.

Dynamo holds the interpreter for seconds, so that a thread would slow every step, and much of its state is the
process's. The other process is given what tensors look like and no weights: it builds the transformer with one block of
each class (a network of the package with all, which may differ and have their zeros in common), makes the canonical
calls on zeros, at the lowest priority, and ends. It lives no longer than its parent.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO

import msgspec
import torch
from torch import Tensor, nn

from safelight.acceleration.apply import accelerate
from safelight.acceleration.blocks import one_block_each, repeated_blocks
from safelight.acceleration.compilation import Compilation
from safelight.acceleration.compile import compile_blocks, compiling, use_cache
from safelight.attention import set_attention_backend
from safelight.core.registry import resolve_class
from safelight.core.server_args import ServerArgs
from safelight.errors import CompilationError, SafelightError
from safelight.loading.blank_network import blank_network
from safelight.loading.components import build_native
from safelight.loading.description import sources
from safelight.loading.repository import Repository, open_for
from safelight.runtime.processes import python_command, safe_environment

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = 19
"""Of processes, as `nice` counts: eager requests go first."""
MAX_MESSAGE = 4096


class Layout(msgspec.Struct, frozen=True, tag="tensor"):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch."))

    def zeros(self, device: torch.device) -> Tensor:
        """Return a tensor that looks so."""
        return torch.empty_strided(self.shape, self.stride, dtype=vars(torch)[self.dtype], device=device).zero_()


class Listed(msgspec.Struct, frozen=True, tag="list"):
    """A list or a tuple in a call's arguments."""

    parts: list[Node]
    is_tuple: bool


class Named(msgspec.Struct, frozen=True, tag="dict"):
    """A dict in a call's arguments."""

    parts: dict[str, Node]


class Static(msgspec.Struct, frozen=True, tag="static"):
    """What is no tensor."""

    value: bool | int | float | str | None


Node = Layout | Listed | Named | Static


def described(tree: Any) -> Node:
    """Say what arguments look like.

    Raises:
        CompilationError: if they hold what cannot be told to another process.

    """
    if isinstance(tree, Tensor):
        return Layout.of(tree)
    if isinstance(tree, list | tuple):
        return Listed([described(part) for part in tree], isinstance(tree, tuple))
    if isinstance(tree, dict):
        return Named({name: described(part) for name, part in tree.items()})
    if tree is None or isinstance(tree, bool | int | float | str):
        return Static(tree)
    raise CompilationError(f"the model cannot be compiled: it is called with a {type(tree).__name__}")


def made_up(node: Node, device: torch.device) -> Any:
    """Return arguments that look so, of zeros."""
    match node:
        case Layout():
            return node.zeros(device)
        case Listed(parts, is_tuple):
            made = [made_up(part, device) for part in parts]
            return tuple(made) if is_tuple else made
        case Named(parts):
            return {name: made_up(part, device) for name, part in parts.items()}
    return node.value


class CallLayout(msgspec.Struct, frozen=True):
    """A canonical call: its component, and what its arguments look like."""

    component: str
    arguments: dict[str, Node]


class Job(msgspec.Struct, frozen=True):
    """What is compiled.

    Attributes:
        server_args: the engine's settings.
        num_threads: of a kernel.
        dtypes: of each component's weights, by their names, those of other blocks left out.
        calls: canonical.

    """

    server_args: ServerArgs
    num_threads: int
    dtypes: dict[str, dict[str, str]]
    calls: list[CallLayout]


class BackgroundCompiler:
    """The process that fills the cache for a compilation.

    Args:
        compilation: whose canonical calls it makes.
        limit: seconds that it may take.

    Raises:
        CompilationError: if the model has no canonical calls.

    """

    def __init__(self, compilation: Compilation, limit: float) -> None:
        self._until = time.monotonic() + limit
        self._process = subprocess.Popen(
            python_command("safelight.runtime.worker.background"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=safe_environment(),
        )
        give_way(self._process.pid)
        assert self._process.stdin is not None
        # It stays open: when it closes, because we have ended, the other process ends too.
        with contextlib.suppress(BrokenPipeError):  # it has died already, and `poll` says so
            self._process.stdin.write(msgspec.json.encode(job_of(compilation)) + b"\n")
            self._process.stdin.flush()

    def poll(self) -> str | None:
        """Return None while it works, then why it failed; an empty string if it did not."""
        code = self._process.poll()
        if code is None and time.monotonic() < self._until:
            return None
        reason = "compiling took longer than a first unit may" if code is None else self._reason(code)
        self.close()
        return reason

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _reason(self, code: int) -> str:
        if code == 0:
            return ""
        assert self._process.stdout is not None
        said = self._process.stdout.read(MAX_MESSAGE).decode(errors="replace").strip()
        return said or f"the compiling process ended with exit code {code}"


def give_way(pid: int) -> None:
    """Let a process, and those that it starts, run on idle cores alone, from the first import on."""
    os.setpriority(os.PRIO_PROCESS, pid, LOWEST_PRIORITY)
    if sys.platform == "linux":
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def job_of(compilation: Compilation) -> Job:
    """Describe what a compilation needs compiled."""
    pipeline = compilation.pipeline
    calls = [
        CallLayout(
            call.component, {name: described(each) for name, each in {**call.kwargs, **call.shared_kwargs}.items()}
        )
        for call in compilation.calls
    ]
    dtypes = {
        name: dtypes_of(module, pipeline.native)
        for name, module in pipeline.denoisers().items()
        if repeated_blocks(module)
    }
    return Job(pipeline.server_args, torch.get_num_threads(), dtypes, calls)


def dtypes_of(module: nn.Module, alike: bool) -> dict[str, str]:
    """Return the dtypes of a module's weights, with one block of each class where those of a list are alike."""
    with one_block_each(module) if alike else contextlib.nullcontext():
        tensors = {**module.state_dict(), **dict(module.named_buffers())}
        return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def fill_cache(job: Job) -> None:
    """Compile what a job names.

    Raises:
        SafelightError: if that cannot be done.

    """
    args = job.server_args
    use_cache()
    torch.set_num_threads(job.num_threads)
    repository = open_for(args)
    native = repository.pipeline.backend == "native"
    make = functools.partial(skeleton if native else blank_network, args)
    modules = {name: make(repository, name, dtypes) for name, dtypes in job.dtypes.items()}
    classes = {name: compile_blocks(module) for name, module in modules.items()}
    for call in job.calls:
        module = modules[call.component]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if native:
                stack.enter_context(one_block_each(module))
            stack.enter_context(compiling(classes[call.component]))
            module(**{name: made_up(node, args.torch_device()) for name, node in call.arguments.items()})


def skeleton(args: ServerArgs, repository: Repository, component: str, dtypes: Mapping[str, str]) -> nn.Module:
    """Return a component of ours as it is loaded, of zeros, with memory for one block of each class."""
    source = sources(repository, repository.pipeline.pipeline_cls())[component]
    module = build_native(resolve_class(source.target), source.folder)
    device = args.torch_device()
    with one_block_each(module):  # the other blocks stay without memory
        weights = {
            name: torch.zeros(tensor.shape, dtype=vars(torch)[dtypes[name]], device=device)
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(weights, assign=True)
    dtype = args.component_dtype(component)
    set_attention_backend(module, args.attention_backend, device.type, dtype)
    accelerate(module, args.kernels, device, dtype)
    return module.eval().requires_grad_(False)


def _end_with_parent(lifeline: BinaryIO) -> None:
    """Wait until the parent's end of the pipe closes."""
    lifeline.read()
    os._exit(1)


def main() -> int:
    """Do the job on standard input; a failure's reason goes to standard output."""
    warnings.simplefilter("ignore")  # what it would warn of is no matter, or fails
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        fill_cache(job)
    except SafelightError as error:
        sys.stdout.write(str(error))
        return 1
    except Exception as error:  # the process's boundary: the log says the rest
        logger.exception("the model cannot be compiled")
        sys.stdout.write(f"the model cannot be compiled: {type(error).__name__}; the log says more")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread that watches the parent would hold the standard input's lock for ever
