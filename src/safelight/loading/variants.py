"""Variants of a checkpoint, such as `model.fp16.safetensors`: which there are, and which is read. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from safelight.errors import InvalidParameterError

STEMS = ("diffusion_pytorch_model", "model")
"""Names of a checkpoint, without ending: diffusers' and transformers'."""
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(STEMS)})"
    rf"(?:(?:\.(?P<v1>\w+))?(?P<shard>{_SHARD})?\.safetensors"
    rf"|(?P<old_shard>{_SHARD})\.(?P<v2>\w+)\.safetensors"
    r"|\.safetensors(?:\.(?P<v3>\w+))?\.index\.json"
    r"|\.safetensors\.index\.(?P<v4>\w+)\.json)"
)
"""Files of a checkpoint. Shards and their index have the variant in one place or, as older libraries wrote, another."""


def heads(stem: str, variant: str | None) -> tuple[str, ...]:
    """Return the names of the file that a checkpoint is read by, its index first."""
    if variant is None:
        return (f"{stem}.safetensors.index.json", f"{stem}.safetensors")
    return (
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.safetensors.{variant}.index.json",
        f"{stem}.{variant}.safetensors",
    )


def variants_in(names: Iterable[str]) -> set[str | None]:
    """Return the variants that a component's files are of; None is for weights without one."""
    matches = filter(None, map(_WEIGHTS.fullmatch, names))
    return {_variant(match) for match in matches if not match["shard"] and not match["old_shard"]}


def own_variant(names: Collection[str], chosen: str | None) -> str | None:
    """Return what is read of a component's files: the chosen variant if they have it, or else those without one."""
    return chosen if chosen in variants_in(names) else None


def choose_variant(components: Mapping[str, Collection[str]], asked: str | None) -> str | None:
    """Return the variant of a repository that is read, as Diffusers reads it: of every component that has it.

    Args:
        components: names of the files in each component's folder.
        asked: what the user set; where it is None and weights without a variant are not whole, the only one there.

    Raises:
        InvalidParameterError: if there is no such variant, or several to choose from.

    """
    found = {name: variants_in(files) for name, files in components.items()}
    known = sorted({variant for variants in found.values() for variant in variants if variant is not None})
    if asked is not None:
        if asked not in known:
            raise InvalidParameterError("variant", asked, " or ".join(known) or "nothing: this model has no variants")
        return asked
    lacking = {name: variants for name, variants in found.items() if variants and None not in variants}
    common = set(known).intersection(*lacking.values())
    if not lacking or len(common) == 1:
        return common.pop() if lacking else None
    raise InvalidParameterError("variant", None, f"{' or '.join(known)}: {min(lacking)} has no weights without one")


def kept(components: Mapping[str, Collection[str]], chosen: str | None) -> list[str]:
    """Return the files of the components' folders that are read, weights of other variants left out."""
    files = []
    for component, names in components.items():
        own = own_variant(names, chosen)
        for name in names:
            match = _WEIGHTS.fullmatch(name)
            if match is None or _variant(match) == own:
                files.append(f"{component}/{name}")
    return files


def _variant(match: re.Match[str]) -> str | None:
    return next((match[group] for group in ("v1", "v2", "v3", "v4") if match[group]), None)
