"""What a package's error is to whoever asked: its words in one line, or the error itself where no value is at fault."""

from __future__ import annotations

import traceback

import pytest
import torch

from safelight.backends.refusals import MAX_LENGTH, one_line, refusal
from safelight.errors import PackageError, StorageError

OF_VALUES = [
    (ValueError("height must be divisible by 8"), "X cannot run these values: height must be divisible by 8"),
    (TypeError("bad operand"), "X cannot run these values: bad operand (TypeError)"),
    (RuntimeError(""), "X cannot run these values: an operation failed (RuntimeError)"),
    (KeyError("layers"), "X cannot run these values: 'layers' (KeyError)"),
]
OF_OTHERS = [
    MemoryError(),
    OSError(28, "No space left on device"),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    StorageError("the disk is full"),
]


@pytest.mark.parametrize(("error", "said"), OF_VALUES, ids=lambda each: type(each).__name__)
def test_what_values_cannot_do_is_said_in_the_packages_words(error, said):
    found = refusal("X", error)
    assert isinstance(found, PackageError) and str(found) == said


@pytest.mark.parametrize("error", OF_OTHERS, ids=lambda error: type(error).__name__)
def test_what_is_no_values_fault_keeps_its_name(error):
    assert refusal("X", error) is error


def failing_operation():
    try:
        torch.ones(2, 3) @ torch.ones(2, 3)
    except RuntimeError as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("got <object object at 0x7f12ab34cd56> here", "got object here"),
        ("in /usr/lib/python3/site-packages/x.py line 3", "in a file line 3"),
        ("got torch.nn.modules.linear.Linear\n  and  more", "got Linear and more"),
        ("word " * 200, ("word " * 200)[: MAX_LENGTH - 1] + "…"),
    ],
)
def test_a_line_holds_no_address_no_file_and_no_module(text, line):
    assert one_line(text) == line


def test_of_a_traceback_only_what_is_before_it_is_said():
    said = one_line(f"it failed: {failing_operation()}")
    assert said == "it failed:"


def test_a_prompt_in_the_words_costs_nothing():
    assert len(one_line("<" * 10_000_000)) <= MAX_LENGTH
