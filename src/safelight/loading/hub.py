"""The Hugging Face Hub, through huggingface_hub: its cache, token, endpoint and offline variables are respected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from safelight.errors import ModelAccessError, ModelError, ModelIndexError, ModelNotFoundError

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")
_WEIGHT_PATTERNS = ("*.safetensors",)
_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
"""Other precisions and copies of the same weights, which are not downloaded."""


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


def download_components(
    repo_id: str, revision: str | None, components: Sequence[str], files: Sequence[str], weights: bool
) -> Path:
    """Download the folders of the named components, with progress, and return the snapshot's folder.

    Raises:
        ModelError: in words, for whatever keeps them from being had.

    """
    from huggingface_hub import snapshot_download

    kinds = _CONFIG_PATTERNS + (_WEIGHT_PATTERNS if weights else ())
    patterns = [*files, *(f"{component}/{kind}" for component in components for kind in kinds)]
    return Path(
        _in_words(
            repo_id,
            revision,
            lambda: snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=list(_VARIANTS)
            ),
        )
    )


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
