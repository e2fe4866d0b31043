"""A model's files, which are another's data: which may be opened, how much of one is read, and as what.

Every file that Safelight, or a library for it, reads of a model passes here first. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safelight.errors import CheckpointError, ModelIndexError, shown

MAX_SETTINGS = 1 << 20
"""Bytes of a configuration; those of published models have some kilobytes."""
MAX_TEXT = 48 << 20
"""Bytes of a tokenizer's files and of an index of shards; the largest that are published have 34 million."""
MAX_CONTAINERS = 2_000_000
"""Lists and objects of a JSON file: a gigabyte of memory could be asked for by 48 MB of brackets."""
SETTINGS = frozenset(
    {
        "model_index.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "scheduler_config.json",
        "special_tokens_map.json",
        "video_preprocessor_config.json",
    }
)
READ_SUFFIXES = frozenset({".jinja", ".json", ".model", ".tiktoken", ".txt"})
"""Of files that a library may read whole; weights are mapped, and others are not opened."""
REFUSED = {"adapter_config.json": "it sends a library to another model for its weights"}
WEIGHTS = ".safetensors"
MAX_ENTRIES, MAX_DEPTH = 2000, 4
"""Of a component's folder."""
BLOBS, SNAPSHOTS = "blobs", "snapshots"
"""Of the Hub's cache: a snapshot's files are links to blobs beside it."""
MAX_HOLES = 1 << 30
"""Bytes of a file that are not there; beyond, no more may be missing than there are."""


def _read_text(path: Path) -> str:
    """Return a file's text, if it is a regular file of a size that its kind may have.

    Raises:
        ModelIndexError: if it is not, or cannot be read.

    """
    where = name_of(path)
    most = MAX_SETTINGS if path.name in SETTINGS else MAX_TEXT
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: to open a device does something already
            raise ModelIndexError(f"{where}: not a regular file")
        # Whatever took its place meanwhile is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelIndexError(f"{where}: not a regular file")
            data = file.read(most + 1)
        if len(data) > most:
            raise ModelIndexError(f"{where}: more than {most:,} bytes, which no file of its kind has")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelIndexError(f"{where}: not readable as JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object: of one meaning, without NaN, and of text that can be written again.

    Raises:
        ModelIndexError: if it cannot be read, or is something else.

    """
    where, text = name_of(path), _read_text(path)
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ModelIndexError(f"{where}: more than {MAX_CONTAINERS:,} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "half of a character" if isinstance(error, UnicodeEncodeError) else error
        raise ModelIndexError(f"{where}: not readable as JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ModelIndexError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)  # what has none but infinity for a bound says so; where it may not, its own check refuses it


def name_of(path: Path) -> str:
    """Return what a file is called in messages: its folder and its name."""
    return f"{path.parent.name}/{path.name}"


def check_inside(root: Path, path: Path) -> Path:
    """Return where a model's file lies when all links are followed: in its folder, or in the Hub's cache beside it.

    Raises:
        CheckpointError: if it lies elsewhere, or its links lead nowhere.

    """
    try:
        home, real = root.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: of a circle, in older versions of Python
        raise CheckpointError(f"{name_of(path)}: a link that leads nowhere") from error
    in_cache = home.parent.name == SNAPSHOTS and real.parent == home.parent.parent / BLOBS
    if not real.is_relative_to(home) and not in_cache:
        raise CheckpointError(f"{name_of(path)}: a link that leaves the model's folder is refused; put the file there")
    return real


def component_files(root: Path, component: str) -> list[Path]:
    """Return the files right in a component's folder, each one of those that a library may open and read.

    Args:
        root: the model's folder.
        component: its name.

    Raises:
        CheckpointError: naming the first file that is none of them.

    """
    folder = root / component
    if not os.path.lexists(folder):
        return []
    check_inside(root, folder)
    if not folder.is_dir():
        raise CheckpointError(f"{component}: not a folder")
    found = []
    for number, path in enumerate(_walk(root, folder, MAX_DEPTH)):
        if number >= MAX_ENTRIES:
            raise CheckpointError(f"{component}: more than {MAX_ENTRIES:,} files")
        _check_file(path)
        if path.parent == folder:
            found.append(path)
    return sorted(found)


def _walk(root: Path, folder: Path, depth: int) -> Iterator[Path]:
    """Yield what is below a folder; folders are walked, links to folders refused."""
    for path in folder.iterdir():
        check_inside(root, path)
        if not path.is_dir() or path.suffix in READ_SUFFIXES | {WEIGHTS}:
            yield path
        elif path.is_symlink() or not depth:
            raise CheckpointError(f"{name_of(path)}: a link to a folder, or folders too deep, in a component's")
        else:
            yield from _walk(root, path, depth - 1)


def _check_file(path: Path) -> None:
    where, state = name_of(path), path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(f"{where}: not a regular file")
    if path.name in REFUSED:
        raise CheckpointError(f"{where} is refused: {REFUSED[path.name]}")
    most = MAX_SETTINGS if path.name in SETTINGS else MAX_TEXT
    if path.suffix in READ_SUFFIXES and state.st_size > most:
        raise CheckpointError(f"{where}: {state.st_size:,} bytes; a file of its kind has at most {most:,}")


def check_holes(path: Path) -> None:
    """Refuse a file that is hardly there: its size stands for the memory that a model of it may take.

    Raises:
        CheckpointError: if more of it is missing than there is.

    """
    size, there, place = path.stat().st_size, 0, 0
    if size <= MAX_HOLES:
        return
    with path.open("rb") as file:
        while place < size and 2 * there < size:
            try:
                begin = os.lseek(file.fileno(), place, os.SEEK_DATA)
            except OSError:  # nothing but a hole from here on
                break
            place = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            there += place - begin
    if 2 * there < size:
        raise CheckpointError(f"{name_of(path)}: most of its {size:,} bytes are a hole")


def weights_digest(folder: Path) -> str:
    """Return a digest of a component's files: their names, sizes, times of change, and the whole of the JSON files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
    return digest.hexdigest()
