"""The table of attention backends, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from safelight.attention.check import AttentionFunction, is_present, largest_error, relative_error
from safelight.attention.chunked import chunked_attention, wins_here
from safelight.attention.hub import load_flash3, load_sage
from safelight.errors import InvalidParameterError

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class AttentionKind:
    """What a kernel is chosen for.

    Attributes:
        device_type: such as `cuda`.
        dtype: of query, key and value.
        has_mask: whether there is an attention mask.
        head_size: channels of one head.
        capability: of the CUDA device, such as 9 for 9.0; None where there is none.

    """

    device_type: str
    dtype: torch.dtype
    has_mask: bool
    head_size: int
    capability: int | None

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.device_type}, {self.dtype}, head size {self.head_size}{', masked' if self.has_mask else ''}"


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention, and where it can.

    Attributes:
        name: as in `--attention-backend`.
        kernel: torch's kernel, or a function; None leaves the choice to torch, call by call.
        dtypes: for each device type that it runs on, the dtypes.
        takes_mask: whether it takes an attention mask.
        max_head_size: the largest head size; None where there is no limit.
        capabilities: the compute capabilities of CUDA devices, by their first number; None where any will do.
        lossy: whether it computes in fewer bits than query, key and value have.
        load: fetches the kernel from the Hub, in place of `kernel`. Such a backend, and a lossy one, is taken only if
            it is asked for by its name.
        in_auto: whether `auto` may take it.

    """

    name: str
    kernel: SDPBackend | AttentionFunction | None
    dtypes: Mapping[str, frozenset[torch.dtype]]
    takes_mask: bool = True
    max_head_size: int | None = None
    capabilities: frozenset[int] | None = None
    lossy: bool = False
    load: Callable[[], AttentionFunction] | None = None
    in_auto: bool = True

    def refusal(self, kind: AttentionKind) -> str | None:
        """Say why it cannot compute this; None if it can."""
        device_type, dtype = kind.device_type, kind.dtype
        if device_type not in self.dtypes:
            return f"it does not run on {device_type}"
        if dtype not in self.dtypes[device_type]:
            return f"it does not take {dtype} on {device_type}"
        if kind.has_mask and not self.takes_mask:
            return "it takes no attention mask"
        if self.max_head_size is not None and kind.head_size > self.max_head_size:
            return f"it takes heads of at most {self.max_head_size}, not {kind.head_size}"
        if self.capabilities is not None and kind.capability not in self.capabilities:
            takes = " or ".join(f"{major}.x" for major in sorted(self.capabilities))
            return f"it takes CUDA devices of compute capability {takes}, not {kind.capability or 'none'}"
        return None

    def loaded(self) -> AttentionBackend:
        """Return the backend with its kernel at hand.

        Raises:
            MissingDependencyError, InvalidParameterError: if it comes from the Hub, and cannot be had.

        """
        return self if self.load is None else replace(self, kernel=self.load(), load=None)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        """Compute attention on [B, H, S, D]; keys and values may have fewer heads, by a whole factor."""
        if torch.compiler.is_compiling() and query.device.type in OPAQUE_ON:
            hidden: Tensor = attention_operator(query, key, value, mask, causal, scale, self.name)
            return hidden
        return self.compute(query, key, value, mask, causal, scale)

    def compute(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        """Compute as `__call__` does, and let a compiler look in."""
        if self.kernel is not None and not isinstance(self.kernel, SDPBackend):
            return self.kernel(query, key, value, mask, causal, scale)
        grouped = query.shape[1] != key.shape[1]
        if self.kernel is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )
        with sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
            )


BACKENDS: Mapping[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend("chunked", chunked_attention, {"cpu": frozenset({torch.bfloat16})}, in_auto=wins_here()),
        AttentionBackend("sdpa", None, {"cpu": FLOATS, "cuda": FLOATS, "mps": FLOATS, "xpu": FLOATS, "meta": FLOATS}),
        AttentionBackend("math", SDPBackend.MATH, {"cpu": FLOATS, "cuda": FLOATS, "mps": FLOATS, "xpu": FLOATS}),
        AttentionBackend(
            "flash", SDPBackend.FLASH_ATTENTION, {"cpu": FLOATS, "cuda": HALF}, takes_mask=False, max_head_size=256
        ),
        AttentionBackend("efficient", SDPBackend.EFFICIENT_ATTENTION, {"cuda": HALF | {torch.float32}}),
        AttentionBackend("cudnn", SDPBackend.CUDNN_ATTENTION, {"cuda": HALF}, max_head_size=128),
        AttentionBackend(
            "flash3", None, {"cuda": HALF}, False, max_head_size=256, capabilities=frozenset({9}), load=load_flash3
        ),
        AttentionBackend(
            "sage",
            None,
            {"cuda": HALF},
            takes_mask=False,
            max_head_size=128,
            capabilities=frozenset({8, 9, 12}),
            lossy=True,
            load=load_sage,
        ),
    )
}
"""Every backend by its name, in the order in which `auto` tries them; all but the lossy are exact up to rounding.

On CUDA `auto` leaves the choice among kernels to torch: on a Hopper it takes cuDNN's by itself, and naming that one
costs 30 us more a call (docs/benchmarks.md).
"""


OPAQUE_ON = frozenset({"cuda"})
"""Device types on which a compiler is shown one operator: torch's choice among CUDA's kernels may read a size as a
number, and the graph would be one of that size alone."""


@torch.library.custom_op("safelight::attention", mutates_args=())
def attention_operator(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, backend: str
) -> Tensor:
    """Compute attention by the backend of a name; as one operator, whose result lies as [B, S, H, D]."""
    attended = loaded_backend(backend).compute(query, key, value, mask, causal, scale)
    return attended.transpose(1, 2).contiguous().transpose(1, 2)


@attention_operator.register_fake
def _attention_without_values(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, backend: str
) -> Tensor:
    batch, num_heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, num_heads, value.shape[-1]).transpose(1, 2)


@cache
def loaded_backend(name: str) -> AttentionBackend:
    """Return a backend of the table with its kernel at hand."""
    return BACKENDS[name].loaded()


def compute_capability(device_type: str) -> int | None:
    """Return the first number of the current CUDA device's compute capability; None where there is no such device."""
    if device_type != "cuda" or not is_present(device_type):
        return None
    return torch.cuda.get_device_capability()[0]


def candidates(requested: str) -> list[AttentionBackend]:
    """Return the backends that may be taken, the preferred first.

    Raises:
        InvalidParameterError: for an unknown name.

    """
    if requested == "auto":
        return [each for each in BACKENDS.values() if each.in_auto and not each.lossy and each.load is None]
    if requested not in BACKENDS:
        raise InvalidParameterError("attention_backend", requested, f"auto, {', '.join(BACKENDS)}")
    return [BACKENDS[requested]]


def disagreement(backend: AttentionBackend, kind: AttentionKind) -> str | None:
    """Run a backend where the device is here; return how it fails, or None."""
    if not is_present(kind.device_type):
        return None
    try:
        error = relative_error(backend, kind.device_type, kind.dtype, kind.head_size, kind.has_mask)
    except RuntimeError as reason:
        if isinstance(reason, torch.AcceleratorError):
            raise  # the device itself has failed
        return f"it does not run: {' '.join(str(reason).split())}"
    if not error <= largest_error(kind.dtype, backend.lossy):
        return f"its result is off by {error:.1e}"
    if backend.lossy:
        logger.warning("attention on %s: %s is off by %.1e", kind, backend.name, error)
    return None


@cache
def select_backend(
    requested: str, device_type: str, dtype: torch.dtype, has_mask: bool, head_size: int
) -> AttentionBackend:
    """Return the backend for a kind of call, after it has been compared with the formula; each choice is logged once.

    Args:
        requested: `auto`, or a name in `BACKENDS`.
        device_type: such as `cuda`.
        dtype: of query, key and value.
        has_mask: whether there is an attention mask.
        head_size: channels of one head.

    Raises:
        InvalidParameterError: for an unknown name, or a backend that cannot; the message says why.
        MissingDependencyError: if the backend needs a package that is missing.

    """
    kind = AttentionKind(device_type, dtype, has_mask, head_size, compute_capability(device_type))
    refusals = []
    for candidate in candidates(requested):
        refusal = candidate.refusal(kind)
        if refusal is None:
            backend = candidate.loaded()
            refusal = disagreement(backend, kind)
            if refusal is None:
                logger.info("attention on %s: %s", kind, backend.name)
                return backend
        refusals.append(f"{candidate.name}: {refusal}")
    raise InvalidParameterError("attention_backend", requested, f"another; {'; '.join(refusals)}")
