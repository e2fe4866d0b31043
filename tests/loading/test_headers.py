"""The header of a safetensors file, read within bounds."""

from __future__ import annotations

import json
import os
import struct

import pytest

from safelight.errors import CheckpointError
from safelight.loading.checkpoint import checkpoint_files
from safelight.loading.headers import MAX_HEADER, MAX_TENSORS, check_header


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "2**63": (safetensors({}, length=2**63), "not a whole safetensors file"),
    "17 MB": (safetensors({}, length=MAX_HEADER + 1), "at most 16,777,216"),
    "cut off": (safetensors({}, length=100), "not a whole"),
    "depth": (safetensors(b'{"a": ' + b"[" * 100_000), "not a whole"),
    "a list": (safetensors([]), "not a whole"),
    "entries that are none": (safetensors({"a": 7}), "has no shape"),
    "a long name": (safetensors({"x" * 10**6: tensor()}, bytes(4)), "1,000,000 characters"),
    "many tensors": (safetensors({str(each): {} for each in range(MAX_TENSORS + 5)}), "more than 20,000 tensors"),
    "a shape that overflows": (safetensors({"a": tensor(shape=(2**40, 2**40))}, bytes(4)), "not a whole"),
    "a negative shape": (safetensors({"a": tensor(shape=(-1,))}, bytes(4)), "has no shape"),
    "no dtype": (safetensors({"a": tensor(dtype=None)}, bytes(4)), "dtype None"),
    "half a byte": (safetensors({"a": tensor("F4", (8,))}, bytes(4)), "'F4', which is not loaded"),
    "codes": (safetensors({"a.weight": tensor("I8", (4,))}, bytes(4)), "quantised weights are not loaded"),
    "truth": (safetensors({"a.bias": tensor("BOOL", (4,))}, bytes(4)), "quantised weights are not loaded"),
    "overlap": (safetensors({"a": tensor(), "b": tensor()}, bytes(4)), "not a whole"),
    "a gap": (safetensors({"a": tensor(), "b": tensor(begin=8, end=12)}, bytes(12)), "not a whole"),
    "out of the file": (safetensors({"a": tensor()}), "not a whole"),
}


@pytest.mark.parametrize(("content", "words"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_is_read_within_bounds(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(tmp_path)
    assert words in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_of_holes_stands_for_no_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"a": tensor(shape=(2**38 // 4,), end=2**38)}))
    os.truncate(path, path.stat().st_size + 2**38)
    with pytest.raises(CheckpointError, match="are a hole"):
        check_header(path)
