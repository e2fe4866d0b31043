"""The table of attention backends, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from safelight.attention.chunked import chunked_attention, wins_here
from safelight.errors import InvalidParameterError

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]
"""Query, key and value [B, H, S, D], mask, whether causal, and scale, to [B, H, S, D]."""


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention, and where it can.

    Attributes:
        name: as in `--attention-backend`.
        kernel: torch's kernel, or one of ours; None leaves the choice to torch, call by call.
        dtypes: for each device type that it runs on, the dtypes.
        takes_mask: whether it takes an attention mask.
        max_head_size: the largest head size; None where there is no limit.
        in_auto: whether `auto` may take it; otherwise it is taken only when asked for by name.

    """

    name: str
    kernel: SDPBackend | Kernel | None
    dtypes: Mapping[str, frozenset[torch.dtype]]
    takes_mask: bool = True
    max_head_size: int | None = None
    in_auto: bool = True

    def refusal(self, device_type: str, dtype: torch.dtype, has_mask: bool, head_size: int) -> str | None:
        """Say why it cannot compute this; None if it can."""
        if device_type not in self.dtypes:
            return f"it does not run on {device_type}"
        if dtype not in self.dtypes[device_type]:
            return f"it does not take {dtype} on {device_type}"
        if has_mask and not self.takes_mask:
            return "it takes no attention mask"
        if self.max_head_size is not None and head_size > self.max_head_size:
            return f"it takes heads of at most {self.max_head_size}, not {head_size}"
        return None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        """Compute attention on [B, H, S, D]; keys and values may have fewer heads, by a whole factor."""
        if callable(self.kernel):
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


HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

BACKENDS: Mapping[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend(
            "chunked",
            chunked_attention,
            {"cpu": frozenset({torch.bfloat16})} if HAS_ONEDNN else {},
            in_auto=wins_here(),
        ),
        AttentionBackend("sdpa", None, {"cpu": FLOATS, "cuda": FLOATS, "mps": FLOATS, "xpu": FLOATS, "meta": FLOATS}),
        AttentionBackend("math", SDPBackend.MATH, {"cpu": FLOATS, "cuda": FLOATS, "mps": FLOATS, "xpu": FLOATS}),
        AttentionBackend(
            "flash", SDPBackend.FLASH_ATTENTION, {"cpu": FLOATS, "cuda": HALF}, takes_mask=False, max_head_size=256
        ),
        AttentionBackend("efficient", SDPBackend.EFFICIENT_ATTENTION, {"cuda": HALF | {torch.float32}}),
        AttentionBackend("cudnn", SDPBackend.CUDNN_ATTENTION, {"cuda": HALF}, max_head_size=128),
    )
}
"""Every backend by its name. The first that can is what `auto` takes; all of these are exact up to rounding."""


@cache
def select_backend(
    requested: str, device_type: str, dtype: torch.dtype, has_mask: bool, head_size: int
) -> AttentionBackend:
    """Return the backend for a kind of call; each choice is logged once.

    Args:
        requested: `auto`, or a name in `BACKENDS`.
        device_type: such as `cuda`.
        dtype: of query, key and value.
        has_mask: whether there is an attention mask.
        head_size: channels of one head.

    Raises:
        InvalidParameterError: for an unknown name, or a backend that cannot; the message says why.

    """
    if requested != "auto" and requested not in BACKENDS:
        raise InvalidParameterError("attention_backend", requested, f"auto, {', '.join(BACKENDS)}")
    offered = [backend for backend in BACKENDS.values() if backend.in_auto]
    candidates = offered if requested == "auto" else [BACKENDS[requested]]
    refusals = []
    for backend in candidates:
        refusal = backend.refusal(device_type, dtype, has_mask, head_size)
        if refusal is None:
            kind = f"{device_type}, {dtype}, head size {head_size}{', masked' if has_mask else ''}"
            logger.info("attention on %s: %s", kind, backend.name)
            return backend
        refusals.append(f"{backend.name}: {refusal}")
    raise InvalidParameterError("attention_backend", requested, f"another; {'; '.join(refusals)}")
