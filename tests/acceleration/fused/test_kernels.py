"""The Triton kernels without a GPU: they compile for GPUs."""

from __future__ import annotations

import platform

import pytest

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no build for this machine"
)


def compiled(kernel, capability, constants):
    """Return the PTX of a kernel on bfloat16, with rotations in float32, for rows that are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        is_number = name.startswith("num_") or name.endswith("stride") or name in NUMBERS
        if name in constants:
            signature[name] = "constexpr"
        elif is_number:
            signature[name] = NUMBERS.get(name, "i32")
        else:
            signature[name] = "*fp32" if name == "rotation" else "*bf16"
        if name.endswith("stride") or name in ("dim", "head_dim") or signature[name].startswith("*"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]


NUMBERS = {"eps": "fp32", "dim": "i32", "head_dim": "i32", "group_size": "i32", "last_group": "i32"}
NORM = {"HAS_UPDATE": True, "HAS_GATE": True, "HAS_NORM": True, "ONE_PLUS": True, "BLOCK": 4096}
HEADS = {"ACROSS_HEADS": False, "BLOCK_HEADS": 32, "BLOCK_DIM": 128}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("residual_norm_kernel", NORM),
        ("residual_norm_kernel", {**NORM, "HAS_NORM": False}),
        ("qk_norm_rotary_kernel", HEADS),
        ("qk_norm_rotary_kernel", {**HEADS, "ACROSS_HEADS": True}),
    ],
    ids=["norm", "residual", "heads", "across heads"],
)
def test_kernels_compile_and_read_16_bytes_at_once(kernel, constants, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from safelight.acceleration.fused import kernels

    ptx = compiled(vars(kernels)[kernel], capability, constants)
    accesses = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
    assert accesses
    for line in accesses:
        assert ".v4.b32" in line, line
