"""Components that are not the model's own: each a folder, or a Hub id, that says what it is. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.errors import InvalidParameterError, ModelIndexError
from safelight.loading import hub
from safelight.loading.files import check_inside, read_json
from safelight.loading.gate import is_class
from safelight.loading.hub import INDEX_NAME

CONFIG_NAMES = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CLASS_KEYS = (
    ("diffusers", "_class_name"),
    ("transformers", "architectures"),
    ("transformers", "tokenizer_class"),
    ("transformers", "processor_class"),
    ("transformers", "image_processor_type"),
    ("transformers", "feature_extractor_type"),
)
"""Where a configuration names its class, and of which library the class then is."""


@dataclass(frozen=True)
class Elsewhere:
    """A component from elsewhere.

    Attributes:
        folder: with its files.
        entry: library and class, as an index has them.

    """

    folder: Path
    entry: tuple[str, str]


@dataclass(frozen=True)
class Change:
    """What is set of a model beside its index.

    Attributes:
        pipeline: class name of the pipeline; None is the index's.
        added: components from elsewhere, by name.

    """

    pipeline: str | None
    added: Mapping[str, Elsewhere]


def existing(name: str) -> Path | None:
    """Return the path that a name stands for, if there is something."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):  # a name that is too long, or ~ of a user whom there is not
        return None


def found_elsewhere(
    component: str, where: str, weights: bool, variant: str | None, there: str | None = None
) -> Elsewhere:
    """Find a component: a folder of its own, or one of its name in another model's.

    Args:
        component: its name.
        where: a folder, or a Hub id, optionally with `@revision`.
        there: its name in the other model, where that is another.
        weights: whether its weights are needed.
        variant: of the weights, if it has it.

    Raises:
        InvalidParameterError: if there is no such component.
        ModelError: if it may not be read.

    """
    there = there or component
    root = existing(where)
    if root is None:
        if not hub.is_repo_id(where):
            raise InvalidParameterError(f"component[{component!r}]", where, "a folder, or a Hub id (owner/name)")
        repo_id, _, revision = where.partition("@")
        root = hub.download_component(repo_id, revision or None, there, weights, variant)
    if not root.is_dir() or Path(component).name != component:
        raise InvalidParameterError(f"component[{component!r}]", where, "a name of a component, and its folder")
    if (root / INDEX_NAME).is_file():
        check_inside(root, root / INDEX_NAME)
        index = read_json(root / INDEX_NAME)
        if not is_class(index.get(there)):
            raise InvalidParameterError(f"component[{component!r}]", where, f"a model with a {there}; it has none")
        return Elsewhere(root / there, (index[there][0], index[there][1]))
    for name in CONFIG_NAMES:
        if (root / name).is_file():
            check_inside(root, root / name)
            return Elsewhere(root, _named_in(read_json(root / name), f"{component}: {name}"))
    raise InvalidParameterError(f"component[{component!r}]", where, f"a folder with {' or '.join(CONFIG_NAMES)}")


def _named_in(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    for library, key in CLASS_KEYS:
        named = config.get(key)
        if isinstance(named, list) and named:
            named = named[0]
        if isinstance(named, str):
            return library, named
    raise ModelIndexError(f"{where} names no class; it takes one of {', '.join(key for _, key in CLASS_KEYS)}")
