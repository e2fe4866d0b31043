"""Every route by which a plan may compute gives the same bytes wherever weights and inputs lie.

Weights are put at every offset that a file may give them, then aligned as at loading; inputs lie where an allocator may
put them. Whatever processor this runs on, each route must agree with itself to the byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.acceleration.cpu_products import (
    FusedGELUProjection,
    OneDNNLinear,
    WidenedLinear,
)
from safelight.acceleration.cpu_vae import DoublingConv, InPlaceResidual, NormSiLU, WidenedConv2d, WinogradConv2d
from safelight.attention.backends import BACKENDS
from safelight.layers.linear import FeedForward, GELUProjection
from safelight.loading.alignment import ALIGNMENT, DEPENDENT, align_weights, is_aligned

FLOAT32, HALVES = torch.float32, (torch.bfloat16, torch.float16)
OF_A_FILE = (8, 24, 40, 56, 4, 2, 16, 32, 48)
"""Bytes by which a mapped file's tensors may be off: headers are multiples of 8, tensors of their own items."""
OF_AN_ALLOCATOR = (0, 64, 192, 512, 2048)
"""Offsets in a page at which torch's allocator and offload's buffers may put a tensor."""

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def lying(tensor: Tensor, offset: int) -> Tensor:
    """Return the tensor, strides kept, at so many bytes behind the beginning of a page."""
    items = tensor.untyped_storage().nbytes()
    memory = torch.empty(items + 2 * 4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 4096 + offset
    moved = memory[start : start + items].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return moved.copy_(tensor)


@dataclass(frozen=True)
class Route:
    """A way of computing.

    Attributes:
        build: makes the module; None for a function of inputs alone.
        shapes: of each input, for each size that is tried.
        dtypes: in which it computes.
        call: the function, of the module's inputs.

    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    dtypes: tuple[torch.dtype, ...] = (FLOAT32, *HALVES)
    layout: torch.memory_format = torch.contiguous_format


class Called(nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


ROWS = (1, 2, 3, 4, 5, 8, 17, 64)
PRODUCTS = ((24, 24), (24, 96), (7, 5), (64, 64), (768, 96), (33, 130), (256, 1), (1, 256))
"""Channels in and out, of real widths and of odd ones."""


def rows_of(channels: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return (*(((rows, channels),) for rows in ROWS), ((1, 1, channels),), ((2, 3, channels),))


def linear(cls: type[nn.Linear] | None, channels: int, out_channels: int, bias: bool) -> Callable[[], nn.Module]:
    return lambda: (cls or nn.Linear)(channels, out_channels, bias=bias)


def heads(queries: int, keys: int, size: int, num_heads: int = 2) -> tuple[tuple[int, ...], ...]:
    return ((1, num_heads, queries, size), (1, num_heads, keys, size), (1, num_heads, keys, size))


ATTENTIONS = tuple(heads(*sizes) for sizes in ((1, 7, 24), (3, 5, 8), (17, 33, 40), (2, 300, 64), (70, 70, 64)))


def attention(name: str, masked: bool) -> Callable[[], nn.Module]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = (torch.arange(key.shape[2]) < max(1, key.shape[2] * 3 // 4))[None, None, None] if masked else None
        return BACKENDS[name](query, key, value, mask, False, None)

    return lambda: Called(attend)


def conv(cls: type[nn.Conv2d] | None, *sizes: int, **details: int) -> Callable[[], nn.Module]:
    return lambda: (cls or nn.Conv2d)(*sizes, **details)  # type: ignore[arg-type]


class Normed(nn.Module):
    """A norm, its SiLU, and a convolution, as residual blocks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, 128)
        self.conv = WinogradConv2d(128, 128, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        made: Tensor = self.conv(pixels, self.norm)
        return made


LAST: dict[str, Any] = {"layout": torch.channels_last}
PICTURES = (((1, 128, 9, 7),), ((1, 128, 72, 66),))
ROUTES: dict[str, Route] = {
    **{
        f"{name} {channels}x{out_channels}{'' if bias else ' without bias'}": Route(
            linear(cls, channels, out_channels, bias), rows_of(channels), dtypes
        )
        for name, cls, dtypes in (
            ("torch's product", None, (FLOAT32, torch.float64, *HALVES)),
            ("oneDNN's product", OneDNNLinear, (FLOAT32,)),
            ("widened product", WidenedLinear, (torch.bfloat16,)),
        )
        for channels, out_channels in PRODUCTS
        for bias in (True, False)
    },
    **{
        f"GELU, {approximate}, {name}": Route(
            (lambda a, f: lambda: FusedGELUProjection(40, 96, a) if f else GELUProjection(40, 96, a))(
                approximate, fused
            ),
            rows_of(40),
            (FLOAT32, torch.bfloat16),
        )
        for approximate in ("tanh", "none")
        for name, fused in (("fused", True), ("apart", False))
    },
    "feed-forward": Route(lambda: FeedForward(24), rows_of(24)),
    **{
        f"{name} attention{', masked' if masked else ''}": Route(
            attention(name, masked), ATTENTIONS, tuple(dtype for dtype in (FLOAT32, *HALVES) if dtype in takes)
        )
        for name, backend in BACKENDS.items()
        if (takes := backend.dtypes.get("cpu", frozenset()))
        for masked in (False, True)
        if backend.takes_mask or not masked
    },
    "products of matrices": Route(
        lambda: Called(torch.matmul), (((2, 1, 24), (2, 24, 9)), ((3, 5, 7), (3, 7, 5)), ((1, 64), (64, 30)))
    ),
    "sums of products": Route(
        lambda: Called(lambda a, b: torch.einsum("bsc,btc->bst", a, b)), (((2, 1, 24), (2, 9, 24)),)
    ),
    "convolution of patches": Route(conv(None, 16, 24, 2, stride=2), (((1, 16, 8, 6),),)),
    "convolution 1x1": Route(conv(None, 16, 8, 1), (((1, 16, 5, 7),),)),
    "convolution 3x3": Route(conv(None, 5, 7, 3, padding=1), (((2, 5, 9, 13),), ((1, 5, 1, 1),))),
    "convolution 3x3, channels last": Route(conv(None, 16, 24, 3, padding=1), (((2, 16, 9, 13),),), **LAST),
    "convolution in time": Route(lambda: nn.Conv3d(4, 6, 3, padding=1), (((1, 4, 3, 5, 6),),)),
    "convolution of patches in time": Route(
        lambda: nn.Conv3d(3, 8, (2, 14, 14), stride=(2, 14, 14)), (((9, 3, 2, 14, 14),),)
    ),
    "convolution of a line": Route(lambda: nn.Conv1d(6, 8, 3, padding=1), (((2, 6, 11),),)),
    "widened convolution": Route(
        conv(WidenedConv2d, 16, 24, 3, padding=1), (((1, 16, 9, 13),),), (torch.bfloat16,), **LAST
    ),
    "Winograd's convolution": Route(
        conv(WinogradConv2d, 128, 128, 3, padding=1), PICTURES, (FLOAT32, torch.bfloat16), **LAST
    ),
    "Winograd's convolution of a norm": Route(Normed, PICTURES, (FLOAT32, torch.bfloat16), **LAST),
    "doubling convolution": Route(
        lambda: DoublingConv(WinogradConv2d(128, 128, 3, padding=1)),
        (((1, 128, 40, 33),),),
        (FLOAT32, torch.bfloat16),
        **LAST,
    ),
    "group norm and SiLU": Route(lambda: NormSiLU(4, 32), (((1, 32, 9, 7),), ((1, 32, 70, 65),)), **LAST),
    "group norm": Route(lambda: nn.GroupNorm(4, 32), (((2, 32, 9, 7),),)),
    "layer norm": Route(lambda: nn.LayerNorm(40), (((1, 40),), ((3, 40),))),
    "RMS norm": Route(lambda: nn.RMSNorm(33), (((1, 33),), ((5, 33),))),
    "softmax": Route(lambda: Called(lambda x: x.softmax(-1)), (((3, 77),), ((1, 5),))),
    "activations": Route(lambda: Called(lambda x: F.silu(x) + F.gelu(x) * x.tanh().exp()), (((3, 77),),)),
}


def laid(module: Any) -> nn.Module:
    """Return a module with the weights of its convolutions channels last."""
    moved: nn.Module = module.to(memory_format=torch.channels_last)
    return moved


def modules_of(route: Route, dtype: torch.dtype):
    """Return the module, with numbers that are always the same."""
    generator = torch.Generator().manual_seed(0)
    module = route.build().eval().requires_grad_(False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    module.to(dtype)
    return laid(module) if route.layout is torch.channels_last else module


def computed(route: Route, dtype: torch.dtype, shapes, weights_at: int, inputs_at: tuple[int, ...]) -> Tensor:
    """Return what a route makes with its weights and inputs at these offsets, after aligning as at loading."""
    module, generator = modules_of(route, dtype), torch.Generator().manual_seed(1)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = lying(tensor.data, weights_at)
    align_weights(module)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    if route.layout is torch.channels_last:
        inputs = [tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs]
    with torch.inference_mode():
        made: Tensor = module(*(lying(tensor, offset) for tensor, offset in zip(inputs, inputs_at, strict=True)))
    return made


@needs_onednn
@pytest.mark.parametrize("name", ROUTES)
def test_bytes_do_not_depend_on_where_tensors_lie(name):
    route = ROUTES[name]
    for dtype, shapes in itertools.product(route.dtypes, route.shapes):
        origin = (0,) * len(shapes)
        expected = computed(route, dtype, shapes, 0, origin)
        assert expected.isfinite().all() and expected.any()
        for offset in (offset for offset in OF_A_FILE if offset % dtype.itemsize == 0):
            assert torch.equal(computed(route, dtype, shapes, offset, origin), expected), (dtype, shapes, offset)
        places = OF_AN_ALLOCATOR[1:]
        for turn in range(len(places)):
            inputs_at = tuple(places[(turn + index) % len(places)] for index in range(len(shapes)))
            assert torch.equal(computed(route, dtype, shapes, places[turn], inputs_at), expected), (dtype, shapes, turn)


def test_every_module_that_a_plan_puts_in_is_a_route():
    """What accelerates on the CPU and is a module stands above; a new one has to be added there."""
    from safelight.acceleration import cpu_products, cpu_vae

    classes = {
        cls.__name__
        for source in (cpu_products, cpu_vae)
        for cls in vars(source).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == source.__name__
    }
    built = {type(part).__name__ for route in ROUTES.values() for part in route.build().modules()}
    assert classes - built == {InPlaceResidual.__name__}, "of whose parts each stands above"


def test_every_attention_backend_of_the_processor_is_a_route():
    on_cpu = {name for name, backend in BACKENDS.items() if "cpu" in backend.dtypes}
    assert on_cpu and all(f"{name} attention" in ROUTES for name in on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_aligning_keeps_values_strides_and_what_lies_well(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype).requires_grad_(False)
    laid(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offsets = itertools.cycle((8, 0, 24, 64, 16, 48, 128))
    tensors = [*model.parameters(), *model.buffers()]
    for tensor, offset in zip(tensors, offsets, strict=False):
        tensor.data = lying(tensor.data, offset)
    before = [tensor.data_ptr() for tensor in tensors]
    assert align_weights(model) == sum(
        place % ALIGNMENT != 0 and t.dtype in DEPENDENT for place, t in zip(before, tensors, strict=True)
    )
    for tensor, place in zip(tensors, before, strict=True):
        assert is_aligned(tensor)
        assert (tensor.data_ptr() == place) == (place % ALIGNMENT == 0 or tensor.dtype not in DEPENDENT)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.stride() == expected[name].stride()
    assert align_weights(model) == 0
