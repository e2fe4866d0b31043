"""Safetensors files as bytes: where in them tensors begin."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from safelight.loading.alignment import ALIGNMENT


def lay(path: Path, shift: int) -> None:
    """Let the first tensor of a file begin `shift` bytes (of 8) behind a boundary, by blanks in the header."""
    header, tensors = _parts(path)
    header += b" " * ((shift - 8 - len(header)) % ALIGNMENT)
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensors)


def begins(path: Path) -> dict[str, int]:
    """Return the byte of the file at which each tensor begins."""
    length = path.stat().st_size - len(_parts(path)[1])
    entries = json.loads(_parts(path)[0])
    return {key: length + entry["data_offsets"][0] for key, entry in entries.items() if key != "__metadata__"}


def _parts(path: Path) -> tuple[bytes, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length].rstrip(b" "), content[8 + length :]
