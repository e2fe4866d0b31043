"""What a client can send for a parameter of a pipeline's call: judged by its annotation, and else by its default."""

from __future__ import annotations

import collections.abc
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.core.options import NULL, Option
from safelight.errors import UsageError

PLAIN: Mapping[Any, str] = {str: "text", int: "integer", float: "number", bool: "boolean"}
PICTURE, ARRAY, OBJECT, UNKNOWN = "picture", "array", "object", "unknown"
LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
EMPTY = inspect.Parameter.empty
_CLIP = re.compile(r"(?:^|_)(?:videos?|frames)(?:_|$)")
"""In a name: what holds pictures is a clip then."""
_NO_MEDIA = re.compile(r"(?:^|_)(?:latents?|embeds?|embeddings?|tokens?|ids|codes|features)(?:_|$)")
"""In a name: it is no picture, whatever its type."""


def _as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Askable:
    """How a parameter is asked for, and handed to the call.

    Attributes:
        option: as which it is asked for.
        makes: what the call is given of a checked value.

    """

    option: Option
    makes: Callable[[Any], Any] = _as_it_is


class UnaskableError(Exception):
    """Why a parameter cannot be asked for: its words go into a refusal."""


def parameters_of(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a call's parameters; annotations that are text as what they stand for, each by itself."""
    found = {}
    for name, parameter in inspect.signature(call).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval_type(annotation, inspect.unwrap(call).__globals__)
            except (NameError, TypeError, AttributeError, SyntaxError):  # imported for type checkers alone, say
                annotation = EMPTY
        found[name] = parameter.replace(annotation=annotation)
    return found


def eval_type(text: str, names: Mapping[str, Any]) -> Any:
    """Return the type that an annotation of the package's own code names."""
    return typing.get_type_hints(types.SimpleNamespace(__annotations__={"value": text}), dict(names))["value"]


def members(annotation: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    """Yield what a parameter may hold, and in how many lists inside each other; None aside."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType or annotation is Ellipsis:
        return
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from members(arg, depth)
    elif origin in LISTS or annotation in LISTS:
        for arg in args or (EMPTY,):
            yield from members(arg, depth + 1)
    else:
        yield (origin or annotation), depth


def base_of(member: Any) -> str:
    """Return what one type is to a client."""
    if member in PLAIN:
        return PLAIN[member]
    if member is typing.Literal:
        return "text"
    if not isinstance(member, type) or member is EMPTY or member is object:
        return UNKNOWN
    if issubclass(member, Image.Image):
        return PICTURE
    if issubclass(member, torch.Tensor | np.ndarray) or member.__name__.endswith("Tensor"):  # types of one dtype
        return ARRAY
    if issubclass(member, collections.abc.Mapping):
        return OBJECT
    return "text" if issubclass(member, enum.Enum) else UNKNOWN


def askable(name: str, parameter: inspect.Parameter, call: Callable[..., Any], others: Mapping[str, Any]) -> Askable:
    """Return how a parameter can be asked for.

    Args:
        name: its own.
        parameter: its annotation and its default.
        call: whose it is.
        others: the names of all of the call.

    Raises:
        UnaskableError: with the reason.

    """
    annotation, default = parameter.annotation, parameter.default
    found = [(base_of(member), depth, member) for member, depth in members(annotation)]
    bases = {base for base, _, _ in found}
    nullable = default is not EMPTY and default is not None
    if bases & {PICTURE, ARRAY} and _is_media(name, bases, call):
        return Askable(Option(_media_kind(name, found, others), "", nullable=nullable), _as_lists)
    if bases & set(PLAIN.values()) or bases == {OBJECT}:  # what else it may be, a client need not send
        return _plain(found, annotation, default, nullable)
    if ARRAY in bases:
        raise UnaskableError("it takes a tensor, which cannot be sent")
    return _by_default(found, default, nullable)


def _by_default(found: list[tuple[str, int, Any]], default: Any, nullable: bool) -> Askable:
    """Return how a parameter whose annotation says nothing is asked for: as what its default is."""
    if default is EMPTY or default is None:
        types_named = {getattr(member, "__name__", str(member)) for _, _, member in found if member is not EMPTY}
        raise UnaskableError(f"it takes {' or '.join(sorted(types_named)) or 'what its annotation does not say'}")
    judged = type(default) if not isinstance(default, list | tuple) else list[type(next(iter(default), 0))]  # type: ignore[misc]
    found = [(base_of(member), depth, member) for member, depth in members(judged)]
    if UNKNOWN in {base for base, _, _ in found}:
        raise UnaskableError(f"it takes a {type(default).__name__}")
    return _plain(found, judged, default, nullable)


def _plain(found: list[tuple[str, int, Any]], annotation: Any, default: Any, nullable: bool) -> Askable:
    """Return how numbers, texts, objects, and lists of these are asked for."""
    kept = [(base, depth, member) for base, depth, member in found if base not in (PICTURE, ARRAY, UNKNOWN)]
    bases, depths = {base for base, _, _ in kept}, {depth for _, depth, _ in kept}
    if bases == {OBJECT}:
        return Askable(Option("object" if depths == {0} else "objects", "", nullable=nullable))
    bases.discard(OBJECT)
    base = (
        "number" if bases == {"integer", "number"} else min(bases, key=["text", "number", "integer", "boolean"].index)
    )
    choices = _choices(annotation, kept)
    if choices is not None:
        option = Option("string", "", choices=tuple(choices), nullable=nullable)
        return Askable(option, choices.__getitem__)
    makes = _as_it_is if takes_tuple(annotation) or isinstance(default, tuple) else _as_lists
    length = _length(annotation) if depths == {1} and base != "boolean" else None
    return Askable(Option(_kind(base, depths), "", length=length, nullable=nullable), makes)


def _kind(base: str, depths: set[int]) -> str:
    """Return the kind of what is one thing, a list of such, or either."""
    if base == "text" and depths <= {0, 1}:
        return "strings" if len(depths) == 2 else "string" if depths == {0} else "texts"
    if depths == {0}:
        return base
    return f"{base}s" if depths == {1} and base != "boolean" else f"{base} or {base}s"


def takes_tuple(annotation: Any) -> bool:
    """Say whether a parameter takes a tuple, and not a list."""
    return any(typing.get_origin(member) is tuple for member in _union(annotation))


def _union(annotation: Any) -> tuple[Any, ...]:
    of_several = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if of_several else (annotation,)


def _length(annotation: Any) -> int | None:
    """Return the length of a tuple whose members are all named: one alone often stands for any number."""
    (only, *more) = [member for member in _union(annotation) if member is not types.NoneType]
    args = typing.get_args(only)
    exact = not more and typing.get_origin(only) is tuple and Ellipsis not in args and len(args) > 1
    return len(args) if exact else None


def _choices(annotation: Any, kept: list[tuple[str, int, Any]]) -> dict[str, Any] | None:
    """Return the values of an enumeration by what they are called; None where it is none."""
    literals = [member for member in _union(annotation) if typing.get_origin(member) is typing.Literal]
    if literals:
        return {str(value): value for literal in literals for value in typing.get_args(literal)}
    enums = [member for _, _, member in kept if isinstance(member, type) and issubclass(member, enum.Enum)]
    return {str(value.value): value for value in enums[0]} if enums else None


def _is_media(name: str, bases: set[str], call: Callable[..., Any]) -> bool:
    """Say whether a parameter takes pictures: its annotation says it, or what it takes is given to a processor."""
    if _NO_MEDIA.search(name):
        return False
    if PICTURE in bases:
        return True
    plain = bases & set(PLAIN.values())
    documented = re.search(rf"^\s*{name} \([^)]*PIL", inspect.unwrap(call).__doc__ or "", re.MULTILINE)
    return not plain and (documented is not None or _is_processed(name, call))


def _is_processed(name: str, call: Callable[..., Any]) -> bool:
    """Say whether the code around a call gives a parameter as it is to the package's processor of pictures."""
    code = inspect.getsource(sys.modules[inspect.unwrap(call).__module__])
    return re.search(rf"\.preprocess(?:_video)?\(\s*{name}\s*[,)]", code) is not None


def _media_kind(name: str, found: list[tuple[str, int, Any]], others: Mapping[str, Any]) -> str:
    in_lists = any(depth for base, depth, _ in found if base in (PICTURE, ARRAY)) or ARRAY in {b for b, _, _ in found}
    of_a_clip = name == "mask" and "video" in others and all(depth for base, depth, _ in found if base == PICTURE)
    return "clip" if in_lists and (_CLIP.search(name) or of_a_clip) else "pictures"


def _as_lists(value: Any) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value


def default_of(parameter: inspect.Parameter, option: Option) -> Any:
    """Return a parameter's default as its kind has it; None where there is none that can be asked for."""
    value = parameter.default
    if value is EMPTY or value is None:
        return None
    value = value.value if isinstance(value, enum.Enum) else value
    try:
        checked = option.check("default", value)
    except UsageError:
        return None
    return None if checked is NULL else checked
