"""Regional compilation: each class of a model's repeated blocks is compiled once, and runs in either form at any time.

**The graphs are a closed set.** Inductor's code depends on the example that it was compiled for: the first sizes decide
how loops are split, and so how sums are rounded. Compiling for whatever comes first would give a request other bytes in
another process. So graphs are made from canonical calls alone: those of the smallest requests that the model takes.
Batch apart, all their sizes are symbols, so that other sizes do not compile again. Afterwards nothing is compiled any
more: a block that no graph takes runs eagerly, today and in every other process. Which form a block takes is thus a
function of its arguments.

**The cache is Inductor's own**, in the user's cache directory. A process that finds everything there only traces, about
a second a class, and loads what another process compiled, which is why both give the same bytes.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from safelight.acceleration.blocks import blocks_by_class
from safelight.errors import MAX_REASON, CompilationError, PackageError

BlockForm = Literal["eager", "compiling", "compiled"]

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""By which Inductor is told where its cache is; whoever sets it before keeps it."""
CACHE_DIRECTORY = "~/.cache/safelight/inductor"
MAX_GRAPHS = 64
"""Of one class of blocks; Dynamo's own limit is made for code that compiles as it goes."""


class BlockClass:
    """All blocks of one class in a module: they share their code, and so their graphs.

    Args:
        name: of the class.
        blocks: modules whose `forward` is their class's.

    """

    def __init__(self, name: str, blocks: Sequence[nn.Module]) -> None:
        self.name = name
        forward = _own_code(type(blocks[0]).forward)
        self._forms: dict[BlockForm, Callable[..., Any]] = {
            "eager": forward,
            "compiling": torch.compile(forward, dynamic=True, fullgraph=True),
            "compiled": torch._dynamo.run(forward),
        }
        self._forward = forward
        for block in blocks:
            assert "forward" not in vars(block), "another technique has taken this block's forward"
            block.forward = functools.partial(self._call, block)

    def set(self, form: BlockForm) -> None:
        """Choose the form of the calls that come."""
        self._forward = self._forms[form]

    def _call(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._forward(block, *args, **kwargs)


def _own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function whose code object is its own: Dynamo keeps graphs by code object."""
    assert isinstance(forward, types.FunctionType), "a block's forward is a plain method"
    copied = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def compile_blocks(module: nn.Module) -> list[BlockClass]:
    """Make a module's repeated blocks ready to be compiled; nothing is compiled, and they run eagerly until told."""
    import_compiler()
    return [BlockClass(name, blocks) for name, blocks in blocks_by_class(module).items()]


@functools.cache
def import_compiler() -> None:
    """Import what of torch compiling needs: seconds, and deprecations of torch's own that nobody here can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.compile_fx
        import torch._inductor.cpp_builder
        import torch.fx.experimental._config  # noqa: F401 - imported for those that follow


@contextmanager
def in_form(classes: Sequence[BlockClass], form: BlockForm) -> Iterator[None]:
    """Let blocks run in a form, for as long as one call takes."""
    for each in classes:
        each.set(form)
    try:
        yield
    finally:
        for each in classes:
            each.set("eager")


@contextmanager
def compiling(classes: Sequence[BlockClass]) -> Iterator[None]:
    """Let blocks make the graphs that they lack, for one call in `inference_mode`.

    Raises:
        CompilationError: if torch cannot compile them.

    """
    import torch._inductor.config
    import torch.fx.experimental._config as shapes
    from torch._dynamo.exc import TorchDynamoException

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Complex products (rotary) run as they do eagerly, as they should.
        warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
        warnings.simplefilter("ignore", DeprecationWarning)
        # Two sizes that happen to be equal are two sizes. Floats are constants of the architecture.
        stack.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
        stack.enter_context(
            torch._dynamo.config.patch(
                specialize_float=True, recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS * 8
            )
        )
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=True))
        stack.enter_context(in_form(classes, "compiling"))
        try:
            yield
        except (TorchDynamoException, PackageError, OSError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0][:MAX_REASON] or type(error).__name__
            raise CompilationError(f"the model cannot be compiled: {reason}") from error


def use_cache() -> Path:
    """Let Inductor keep what it compiles in the user's cache directory, of mode 0700: it loads code from there.

    Dynamo has named a folder that all users share, by its import, where nobody has named one before. That is not kept:
    another user could put code there.

    Raises:
        CompilationError: if there is no home directory, or it cannot be written.

    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    named = Path(os.environ.get(CACHE_VARIABLE) or default_cache_dir()).absolute()
    try:
        path = Path(CACHE_DIRECTORY).expanduser() if named == Path(default_cache_dir()).absolute() else named
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        where = f"{CACHE_VARIABLE} takes a folder that can be written, of this user alone"
        raise CompilationError(f"compile: the cache of what is compiled cannot be used: {error}; {where}") from error
    os.environ[CACHE_VARIABLE] = str(path)
    return path


def missing_toolchain(device_type: str) -> str | None:
    """Say what compiling for a device needs and this machine lacks; None if it has all."""
    import_compiler()
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a C++ compiler (g++ or clang++), and there is none"
        return None
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton, and it is not here or does not run on this device"
    return missing_for_launchers()


def missing_for_launchers() -> str | None:
    """Say what Triton lacks on this machine to build what launches its kernels; None if it has all."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"a C compiler ({' or '.join(compilers)}), and there is none"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.is_file() else "the headers of Python (Debian: python3-dev), and they are not here"


@functools.cache
def warm_up_compiler() -> None:
    """Import and prepare what compiling needs, once a process; the graphs that follow then take a second each."""
    import_compiler()
    import torch._inductor.codecache

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch._inductor.codecache.torch_key()
        torch._inductor.codecache.CacheBase.get_system()
        layer = nn.Linear(4, 4).requires_grad_(False)
        torch.compile(lambda hidden: nn.functional.gelu(layer(hidden)), backend="aot_eager", dynamic=True)(
            torch.zeros(3, 4)
        )
