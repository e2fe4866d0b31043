"""Sampling parameters made from the signature of a Diffusers pipeline's `__call__`."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from safelight.core.params import Option, SamplingParams, make_params_cls

KINDS: Mapping[frozenset[Any], str] = {
    frozenset({str}): "string",
    frozenset({str, list[str]}): "strings",
    frozenset({list[str]}): "strings",
    frozenset({int}): "integer",
    frozenset({float}): "number",
    frozenset({int, float}): "number",
    frozenset({float, list[float]}): "number",
    frozenset({bool}): "boolean",
    frozenset({list[float]}): "numbers",
    frozenset({list[int]}): "integers",
    frozenset({tuple[int, int]}): "integers",
}
"""What a parameter's types, None aside, make of it; others are refused."""
DEFAULT_FPS = 24
"""Of a file, for a pipeline that does not say."""
OURS = frozenset({"prompt", "seed", "n", "output_type"})
"""Common fields that every pipeline has here, whatever its signature says."""


def params_from_signature(call: Callable[..., Any], name: str) -> type[SamplingParams]:
    """Return a dataclass of what may be asked of a pipeline, named after it.

    Args:
        call: its `__call__`.
        name: of the pipeline.

    """
    given = {key: value for key, value in inspect.signature(call).parameters.items() if key not in ("self", "kwargs")}
    kinds = {
        key: kind
        for key, value in given.items()
        if (kind := kind_of(value.annotation)) is not None and "ip_adapter" not in key  # none is ever loaded
    }
    common = {field.name for field in dataclasses.fields(SamplingParams)}
    aliases = SamplingParams.aliases
    own = [key for key in kinds if key not in common and key not in aliases and key not in SamplingParams.refused]
    kept = common & kinds.keys() | OURS | ({"fps"} if "num_frames" in kinds else set())
    defaults = {key: value.default for key, value in given.items() if key in kinds and _states(value)}
    if "num_frames" in kinds:
        defaults["fps"] = defaults.get("frame_rate", DEFAULT_FPS)
    refused = dict.fromkeys(given.keys() - kinds.keys(), "it is not supported through the diffusers package")
    return make_params_cls(
        f"{name.removesuffix('Pipeline')}SamplingParams",
        {key: Option(kinds[key], f"{key} of {name}") for key in own},
        defaults={**SamplingParams.defaults, **{key: defaults[key] for key in defaults.keys() & {*own, *kept}}},
        excluded=frozenset(common - kept),
        refused={**refused, **SamplingParams.refused},
    )


def kind_of(annotation: Any) -> str | None:
    """Return the kind of a parameter, from its annotation; None where it is of none that can be asked for."""
    members = _members(annotation)
    return "images" if Image.Image in members else KINDS.get(members)


def takes_tuple(annotation: Any) -> bool:
    """Say whether a parameter takes a tuple, and not a list."""
    return any(typing.get_origin(member) is tuple for member in _members(annotation))


def _members(annotation: Any) -> frozenset[Any]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return frozenset(typing.get_args(annotation) if union else (annotation,)) - {types.NoneType}


def _states(parameter: inspect.Parameter) -> bool:
    return parameter.default is not None and parameter.default is not inspect.Parameter.empty
