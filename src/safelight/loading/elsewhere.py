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
        is_asked_for: by name, and not as one of another model's.

    """

    folder: Path
    entry: tuple[str, str]
    is_asked_for: bool = True


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


def found_elsewhere(component: str, where: str, weights: bool, variant: str | None) -> dict[str, Elsewhere]:
    """Find a component: a folder of its own, or one of its name in another model's.

    Args:
        component: its name; of the form `prior_*`, every component of another model, as `prior_NAME`.
        where: a folder, or a Hub id, optionally with `@revision`.
        weights: whether its weights are needed.
        variant: of the weights, if it has it.

    Raises:
        InvalidParameterError: if there is no such component.
        ModelError: if it may not be read.

    """
    field, prefix = f"component[{component!r}]", component.removesuffix("*") if component.endswith("_*") else None
    root = existing(where)
    if root is None:
        if not hub.is_repo_id(where):
            raise InvalidParameterError(field, where, "a folder, or a Hub id (owner/name)")
        root = _downloaded(where, component if prefix is None else None, weights, variant)
    if not root.is_dir() or Path(component).name != component:
        raise InvalidParameterError(field, where, "a name of a component, and its folder")
    if (root / INDEX_NAME).is_file():
        there = _components_in(root)
        if prefix is not None:
            return {prefix + name: Elsewhere(root / name, entry, False) for name, entry in there.items()}
        if component in there:
            return {component: Elsewhere(root / component, there[component])}
        raise InvalidParameterError(field, where, f"a model with a {component}; it has none")
    for name in CONFIG_NAMES:
        if prefix is None and (root / name).is_file():
            check_inside(root, root / name)
            return {component: Elsewhere(root, _named_in(read_json(root / name), f"{component}: {name}"))}
    takes = INDEX_NAME if prefix is not None else " or ".join(CONFIG_NAMES)
    raise InvalidParameterError(field, where, f"a folder with {takes}")


def _downloaded(where: str, component: str | None, weights: bool, variant: str | None) -> Path:
    """Return the folder of a Hub id, with one component, or all."""
    repo_id, _, revision = where.partition("@")
    return hub.download_component(repo_id, revision or None, component, weights, variant)


def _components_in(root: Path) -> dict[str, tuple[str, str]]:
    """Return the library and the class of each component that a model's index names."""
    check_inside(root, root / INDEX_NAME)
    index = read_json(root / INDEX_NAME)
    return {name: tuple(entry) for name, entry in index.items() if is_class(entry) and Path(name).name == name}


def _named_in(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    for library, key in CLASS_KEYS:
        named = config.get(key)
        if isinstance(named, list) and named:
            named = named[0]
        if isinstance(named, str):
            return library, named
    raise ModelIndexError(f"{where} names no class; it takes one of {', '.join(key for _, key in CLASS_KEYS)}")
