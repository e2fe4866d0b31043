"""A model's bytes do not depend on where its files hold the weights, nor on where anything else put a tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.core.pipeline import ComposedPipeline
from safelight.core.request import Req
from safelight.loading.alignment import ALIGNMENT, DEPENDENT, is_aligned
from safelight.testing.models import TinyModels, load, requests, run_alone, same
from safelight.testing.recipes import Recipe
from safelight.testing.suites.suite import Suite

PRODUCTS = ("addmm", "addmv", "bmm", "conv", "dot", "einsum", "linear", "matmul", "mm", "mv", "attention")
"""Parts of the names of operators that multiply and add up."""


class AlignmentSuite(Suite):
    """Addresses."""

    def test_operands_lie_where_they_always_do(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Every operand of a product in float32 is a weight on the boundary, or in memory of torch's allocator.

        In the encoders and VAEs of the libraries as well. A view's offset in its memory is the same each time.
        """
        first = {case.variant: case for case in reversed(recipe.cases) if not case.slow}
        for variant, case in first.items():
            pipeline = tiny_models.ours(recipe, variant)
            check_operands(pipeline, requests(pipeline, {**case.fields, "n": 1})[0])

    @pytest.mark.parametrize("kernels", ["auto", "plain"])
    def test_bytes_do_not_depend_on_the_files_header(
        self, recipe: Recipe, tiny_models: TinyModels, tmp_path: Path, kernels: str
    ) -> None:
        """Whatever the length of the header, which shifts all tensors behind it."""
        case = next(case for case in recipe.cases if case.variant == "default")
        outputs = []
        for shift in (0, 8, 40):
            folder = tmp_path / str(shift)
            shutil.copytree(tiny_models.folder(recipe), folder)
            for path in folder.rglob("*.safetensors"):
                lay(path, shift)
            pipeline = load(folder, dtype="float32", kernels=kernels)
            assert all(is_aligned(tensor) for module in pipeline.modules().values() for tensor in module.parameters())
            (req, *_) = requests(pipeline, {**case.fields, "n": 1})
            run_alone(pipeline, req)
            outputs.append(req.outputs)
        assert all(same(outputs[0], other) for other in outputs[1:])


def lay(path: Path, shift: int) -> None:
    """Let the first tensor of a file begin `shift` bytes (of 8) behind a boundary, by blanks in the header."""
    content = path.read_bytes()
    begun = 8 + int.from_bytes(content[:8], "little")
    header = content[8:begun].rstrip(b" ")
    header += b" " * ((shift - 8 - len(header)) % ALIGNMENT)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[begun:])


def check_operands(pipeline: ComposedPipeline, req: Req) -> None:
    """Run a request, and look at every operand of a product."""
    weights = {
        tensor.data_ptr()
        for module in pipeline.modules().values()
        for tensor in (*module.parameters(), *module.buffers())
        if is_aligned(tensor)
    }
    watched = Operands(weights)
    with watched:
        run_alone(pipeline, req)
    assert watched.num_seen > 100
    assert not watched.astray


class Operands(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operands of products that lie elsewhere.

    Args:
        weights: addresses of weights that lie well, in a mapped file for example.

    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.num_seen = 0
        self.astray: set[tuple[str, tuple[int, ...], int]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operands of one operation, and do it."""
        if any(part in str(func) for part in PRODUCTS):
            for tensor in tree_leaves((args, kwargs)):
                if not isinstance(tensor, Tensor) or tensor.dtype not in DEPENDENT or not tensor.numel():
                    continue
                self.num_seen += 1
                its_memory = tensor.untyped_storage().data_ptr()
                if its_memory % ALIGNMENT and tensor.data_ptr() not in self.weights:
                    self.astray.add((str(func), tuple(tensor.shape), its_memory % ALIGNMENT))
        return func(*args, **(kwargs or {}))
