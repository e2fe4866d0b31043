"""Processors as Linux describes them, every plan that is made for one of them, and one of all that there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from safelight.acceleration.cpu import PLAIN, CpuPlan, Processor, make_plan

EVERYTHING = CpuPlan(True, True, True, True)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
AVX512 = frozenset({"avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl"})

PROCESSORS = {
    "Zen 3": Processor("x86_64", "AuthenticAMD", frozenset({"avx2", "fma"})),
    "Zen 4": Processor("x86_64", "AuthenticAMD", AVX512 | {"avx512_bf16", "avx512_vnni"}),
    "Zen 5": Processor("x86_64", "AuthenticAMD", AVX512 | {"avx512_bf16", "avx512_vnni", "avx_vnni"}),
    "Cascade Lake": Processor("x86_64", "GenuineIntel", AVX512 | {"avx512_vnni"}),
    "Sapphire Rapids": Processor("x86_64", "GenuineIntel", AVX512 | {"avx512_bf16", "amx_bf16", "amx_tile"}),
    "AVX2": Processor("x86_64", "GenuineIntel", frozenset({"avx2"})),
    "Graviton": Processor("aarch64", "", frozenset({"asimd", "bf16", "sve"})),
    "unknown": Processor("x86_64", "", frozenset()),
}


def plans() -> dict[str, CpuPlan]:
    """Return every plan that one of these processors is given, each once, by what it consists of."""
    made = {
        make_plan(processor, has_onednn, lambda product, exact=is_exact: exact)  # type: ignore[misc]
        for processor, has_onednn, is_exact in itertools.product(PROCESSORS.values(), (True, False), (True, False))
    }
    named = {", ".join(name for name, chosen in vars(plan).items() if chosen): plan for plan in made}
    return {name or "plain": named[name] for name in sorted(named)}


PLANS = plans()
assert PLANS["plain"] == PLAIN
