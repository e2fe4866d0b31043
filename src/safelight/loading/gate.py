"""The gate of a model's folder: whatever a library will open there is looked at before one does. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.loading.expressions import check_tokenizer, check_vocabulary
from safelight.loading.files import component_files, name_of, read_json
from safelight.loading.settings import bounds_of, check_settings

VOCABULARIES = frozenset({"added_tokens.json", "vocab.json"})
"""JSON of tokens and their numbers alone."""


def check_model(root: Path, index: Mapping[str, Any], components: Sequence[str]) -> None:
    """Check every file of a model's components: where it lies, what it is, its size, and what its JSON says.

    What weights and their indexes say is checked where they are opened (`checkpoint.py`).

    Args:
        root: the model's folder.
        index: its `model_index.json`.
        components: names of those that may be opened. A name that is a path is refused elsewhere.

    Raises:
        ModelError: naming the file, and what is wrong with it.

    """
    for name in components:
        if Path(name).name == name:
            class_name = index[name][1] if is_class(index.get(name)) else ""
            for path in component_files(root, name):
                check_file(path, class_name)


def check_folder(folder: Path, class_name: str) -> None:
    """Check every file of a component that has a folder of its own, outside a model's.

    Args:
        folder: the component's.
        class_name: of the component.

    Raises:
        ModelError: naming the file, and what is wrong with it.

    """
    for path in component_files(folder, "."):
        check_file(path, class_name)


def is_class(entry: Any) -> bool:
    """Say whether an entry of `model_index.json` is `[library, class]`."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def check_file(path: Path, class_name: str) -> None:
    """Check what a file says, if it is one of those that a library reads.

    Args:
        path: right in a component's folder.
        class_name: of the component, in the index.

    Raises:
        ModelError: naming the file.

    """
    where = name_of(path)
    if path.name in VOCABULARIES:
        check_vocabulary(read_json(path), where)
    elif path.name == "tokenizer.json":
        check_tokenizer(read_json(path), where)
    elif bounds_of(path.name, class_name) is not None:
        check_settings(read_json(path), path.name, where, class_name)
    elif path.name == "generation_config.json":
        read_json(path)
