"""What a device's errors mean."""

from __future__ import annotations

import pytest
import torch

from safelight.core.device import is_lost, is_out_of_memory, numbered, on_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 TB"), True),
        (RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("can't allocate memory"), False),
        (None, False),
    ],
)
def test_errors_of_memory_are_known_by_their_words(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def test_an_accelerators_own_error_stays_but_for_one_of_memory():
    assert is_lost(torch.device("cuda"), torch.AcceleratorError("CUDA error: an illegal memory access"))
    assert not is_lost(torch.device("cuda"), torch.AcceleratorError("CUDA error: out of memory"))


def test_a_processor_is_never_lost():
    assert not is_lost(CPU, RuntimeError("anything")) and numbered(CPU) == CPU
    with on_device(CPU):
        assert torch.zeros(1).device == CPU
    assert numbered(torch.device("cuda:1")) == torch.device("cuda:1")
