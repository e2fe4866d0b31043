"""The header of a safetensors file, read within bounds before a library maps the file. Imports no torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from safelight.errors import CheckpointError, in_one_line, shown
from safelight.loading.files import check_holes, name_of

MAX_HEADER = 16 << 20
"""Bytes; a header of 20,000 tensors has three million."""
MAX_TENSORS = 20_000
"""Of a file, a component or a pipeline; the largest models have some thousands."""
MAX_NAME = 512
"""Characters of a tensor's."""
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
DTYPES = FLOATING | {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
"""Of tensors; what else safetensors knows packs several numbers into a byte, or has no products."""
LEARNED = frozenset({"weight", "bias"})
"""Last parts of the names of tensors that are multiplied and added: whole numbers there are codes of a quantisation."""


def check_header(path: Path) -> None:
    """Refuse a safetensors file by what its header says.

    Offsets that overlap, and lengths that do not fit, are left to the library, which maps it.

    Raises:
        CheckpointError: naming the file.

    """
    where = name_of(path)
    check_holes(path)
    for name, entry in _header(path, where).items():
        if name != "__metadata__":
            _check_entry(name, entry, where)


def _header(path: Path, where: str) -> dict[str, Any]:
    broken = f"{where}: not a whole safetensors file"
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise CheckpointError(f"{broken} (of {len(first)} bytes)")
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            raise CheckpointError(f"{broken} (a header of {length:,} bytes; at most {MAX_HEADER:,})")
        text = file.read(length)
    if text.count(b"{") > MAX_TENSORS + 2:
        raise CheckpointError(f"{where}: more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{broken} ({in_one_line(error)})") from error
    if len(text) < length or not isinstance(header, dict):
        raise CheckpointError(f"{broken} (its header is cut off, or no object)")
    return header


def _check_entry(name: str, entry: Any, where: str) -> None:
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: a tensor's name of {len(name):,} characters")
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{where}: not a whole safetensors file ({shown(name)} has no shape)")
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: {shown(name)} is of dtype {shown(dtype)}, which is not loaded")
    if name.rpartition(".")[2] in LEARNED and dtype not in FLOATING and math.prod(shape):
        raise CheckpointError(f"{where}: {shown(name)} is of dtype {dtype}: quantised weights are not loaded")
