"""The Hugging Face Hub, through huggingface_hub: its cache, token, endpoint and offline variables are respected."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safelight.errors import ModelAccessError, ModelError, ModelIndexError, ModelNotFoundError
from safelight.loading.variants import choose_variant, kept

T = TypeVar("T")
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
INDEX_NAME = "model_index.json"
DEFAULTS_NAME = "generation_config.json"
"""Where a repository may state its own default sampling values, as transformers' repositories do."""
_CONFIG_SUFFIXES = (".json", ".txt", ".model")
_WEIGHT_SUFFIX = ".safetensors"


def is_repo_id(name: str) -> bool:
    """Say whether a name can be a Hub id, `owner/name` or `owner/name@revision`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name


def download_index(repo_id: str, revision: str | None) -> Path:
    """Download `model_index.json`, or find it in the cache.

    Raises:
        ModelError: in words, for whatever keeps it from being had.

    """
    from huggingface_hub import hf_hub_download

    return Path(_in_words(repo_id, revision, lambda: hf_hub_download(repo_id, INDEX_NAME, revision=revision)))


def download_components(
    repo_id: str, revision: str | None, cached: Path, components: Sequence[str], weights: bool, variant: str | None
) -> Path:
    """Download the folders of the named components, with progress, and return the snapshot's folder.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit.
        cached: the snapshot's folder, as far as it is in the cache.
        components: their names.
        weights: whether theirs are downloaded.
        variant: of the weights, as `open_repository` takes it.

    Raises:
        ModelError: in words, for whatever keeps them from being had.
        InvalidParameterError: if the variant is not there.

    """
    from huggingface_hub import snapshot_download

    patterns = _patterns(_listed(repo_id, revision, cached), components, weights, variant)
    return Path(
        _in_words(repo_id, revision, lambda: snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    )


def download_component(
    repo_id: str, revision: str | None, component: str | None, weights: bool, variant: str | None
) -> Path:
    """Download one component, or all, and return the snapshot's folder: a repository of its own, or one with an index.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit.
        component: its name, which is its folder's in a repository with an index; None for all that an index names.
        weights: whether its weights are downloaded.
        variant: of the weights, if the component has it.

    Raises:
        ModelError: in words, for whatever keeps it from being had.

    """
    from huggingface_hub import HfApi, errors, snapshot_download

    def listed() -> list[str]:
        try:
            return HfApi().list_repo_files(repo_id, revision=revision)
        except (errors.HTTPError, OSError):  # type: ignore[attr-defined]  # httpx's, as bundled there
            known = ["*.json"] if component is None else [INDEX_NAME, "config.json", f"{component}/config.json"]
            cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=known))
            return [path.relative_to(cached).as_posix() for path in cached.rglob("*")]

    names = _in_words(repo_id, revision, listed)
    suffixes = (*_CONFIG_SUFFIXES, _WEIGHT_SUFFIX) if weights else _CONFIG_SUFFIXES
    folders: dict[str, list[str]] = {}
    for folder, _, name in (path.rpartition("/") for path in names if path.endswith(suffixes)):
        if (folder in ("", component) or component is None) and bool(folder) == (INDEX_NAME in names):
            folders.setdefault(folder, []).append(name)
    files = kept(folders, variant)
    patterns = [INDEX_NAME, *(glob.escape(path.removeprefix("/")) for path in files)]
    return Path(
        _in_words(repo_id, revision, lambda: snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    )


def _patterns(listed: Sequence[str], components: Sequence[str], weights: bool, variant: str | None) -> list[str]:
    """Return the patterns of the files to download."""
    folders: dict[str, list[str]] = {name: [] for name in components}
    for path in listed:
        folder, _, name = path.rpartition("/")
        if folder in folders and name.endswith((*_CONFIG_SUFFIXES, _WEIGHT_SUFFIX)):
            folders[folder].append(name)
    chosen = choose_variant(folders, variant) if weights else None
    names = [name for name in kept(folders, chosen) if weights or not name.endswith(_WEIGHT_SUFFIX)]
    patterns = [DEFAULTS_NAME, INDEX_NAME, *map(glob.escape, names)]
    if weights and not any(name.endswith(_WEIGHT_SUFFIX) for name in names):
        # Of a cache without weights the client says that it is not whole.
        patterns += [f"{folder}/*{_WEIGHT_SUFFIX}" for folder in folders]
    return patterns


def _listed(repo_id: str, revision: str | None, cached: Path) -> list[str]:
    """Return the names of a repository's files: as the Hub says, or, where it is out of reach, what is in the cache."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]  # httpx's, as bundled there
        return [path.relative_to(cached).as_posix() for path in cached.rglob("*")]


def _in_words(repo_id: str, revision: str | None, download: Callable[[], T]) -> T:
    """Run a download; every way in which it can fail becomes an error that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"{repo_id}@{revision}" if revision else repo_id
    if HF_HUB_CACHE.startswith("~"):
        raise ModelError(f"{name} would be kept in a home directory, and there is none: set HF_HOME to a folder")
    try:
        return download()
    except errors.GatedRepoError as error:
        raise ModelAccessError(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo_id} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"{name}: no such repository on the Hub, or a private one without HF_TOKEN") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} is not, or not wholly, in the cache, and the Hub is out of reach or HF_HUB_OFFLINE is set"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelIndexError(f"{name}: no {INDEX_NAME} there; a model is a repository in Diffusers layout") from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # httpx's, as bundled there
        reason = " ".join(str(error).split())
        raise ModelError(f"{name} could not be downloaded: {reason}") from error
