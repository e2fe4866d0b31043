"""The Hugging Face Hub, through huggingface_hub: its cache, token, endpoint and offline variables are respected."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import ModelAccessError, ModelError, ModelIndexError, ModelNotFoundError
from safelight.loading.variants import choose_variant, kept

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_CONFIG_SUFFIXES = (".json", ".txt", ".model")
_WEIGHT_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Selection:
    """What of a repository is downloaded.

    Attributes:
        components: the folders.
        files: beside them.
        weights: whether those of the components are.
        variant: of the weights, as `open_repository` takes it.

    """

    components: Sequence[str]
    files: Sequence[str]
    weights: bool
    variant: str | None


def is_repo_id(name: str) -> bool:
    """Say whether a name can be a Hub id, `owner/name` or `owner/name@revision`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name


def download_file(repo_id: str, filename: str, revision: str | None) -> Path:
    """Download one file, or find it in the cache.

    Raises:
        ModelError: in words, for whatever keeps it from being had.

    """
    from huggingface_hub import hf_hub_download

    return Path(_in_words(repo_id, revision, lambda: hf_hub_download(repo_id, filename, revision=revision)))


def download_components(repo_id: str, revision: str | None, cached: Path, selection: Selection) -> Path:
    """Download the folders of the named components, with progress, and return the snapshot's folder.

    Args:
        repo_id: the repository.
        revision: branch, tag or commit.
        cached: the snapshot's folder, as far as it is in the cache.
        selection: what of it.

    Raises:
        ModelError: in words, for whatever keeps them from being had.
        InvalidParameterError: if the variant is not there.

    """
    from huggingface_hub import snapshot_download

    patterns = _patterns(_listed(repo_id, revision, cached), selection)
    return Path(
        _in_words(repo_id, revision, lambda: snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    )


def _patterns(listed: Sequence[str], selection: Selection) -> list[str]:
    """Return the patterns of the files to download."""
    folders: dict[str, list[str]] = {name: [] for name in selection.components}
    for path in listed:
        folder, _, name = path.rpartition("/")
        if folder in folders and name.endswith((*_CONFIG_SUFFIXES, _WEIGHT_SUFFIX)):
            folders[folder].append(name)
    chosen = choose_variant(folders, selection.variant) if selection.weights else None
    names = [name for name in kept(folders, chosen) if selection.weights or not name.endswith(_WEIGHT_SUFFIX)]
    patterns = [*selection.files, *map(glob.escape, names)]
    if selection.weights and not any(name.endswith(_WEIGHT_SUFFIX) for name in names):
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


def _in_words(repo_id: str, revision: str | None, download: Callable[[], str]) -> str:
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
        raise ModelIndexError(
            f"{name}: no model_index.json there; a model is a repository in Diffusers layout"
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # httpx's, as bundled there
        reason = " ".join(str(error).split())
        raise ModelError(f"{name} could not be downloaded: {reason}") from error
