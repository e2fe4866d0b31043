"""How everything that can be asked for or set is declared: a field of a dataclass, with its `Option`.

Parameters of a generation (`SamplingParams` and its subclasses), settings of an engine (`ServerArgs`) and of HTTP
(`HTTPArgs`) are such dataclasses. Checks, defaults, flags, their help, keys of a file of settings and JSON Schema are
made from them. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from safelight.errors import InvalidParameterError

MAX_SETTING_LENGTH = 4096
"""Characters of a setting: a path is no longer."""
MAX_PROMPT_LENGTH = 8192
MAX_DEPTH, MAX_ENTRIES = 8, 4096
"""Of a value of plain JSON: lists and objects inside each other, and all that is in them."""
MAX_CLIP_FRAMES = 1024


class Null(enum.Enum):
    """The value null, where it says something else than unset: for fields whose default is another."""

    NULL = "null"


NULL = Null.NULL


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of one field: its kind, range, help and place in a form.

    Attributes:
        kind: one of the names in `KINDS`.
        help: one line for people.
        group: `basic` or `advanced`.
        minimum, maximum: inclusive bounds of a number, or of each entry of a list of numbers.
        choices: the values that a text may have.
        length: that a list must have.
        nullable: whether null is a value, and not what is unset.

    """

    kind: str
    help: str
    group: str = "advanced"
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    length: int | None = None
    nullable: bool = False

    def takes(self) -> str:
        """Say in words what values the field takes."""
        if self.choices:
            return ("" if self.kind == "choice" else "one of ") + ", ".join(self.choices)
        described = KINDS[self.kind].description
        if self.length is not None:
            return f"{described}, {self.length} of them"
        if self.minimum is not None and self.maximum is not None:
            return f"{described} from {self.minimum} to {self.maximum}"
        return f"{described} of at least {self.minimum}" if self.minimum is not None else described

    def check(self, name: str, value: Any) -> Any:
        """Return the value in its plain Python type, or raise `InvalidParameterError` that names the field."""
        if self.nullable and (value is None or value is NULL):
            return NULL
        plain = KINDS[self.kind].convert(value)
        of_its_length = self.length is None or (isinstance(plain, tuple) and len(plain) == self.length)
        if plain is None or not of_its_length or not self._in_range(plain):
            raise InvalidParameterError(name, value, self.takes())
        return plain

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        numeric = [entry for entry in leaves(value) if isinstance(entry, int | float)]
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        return all(low <= entry <= high for entry in numeric)

    def json_schema(self) -> dict[str, Any]:
        """Return a JSON Schema (2020-12) of the field, with its range, and its group for forms."""
        schema = {**KINDS[self.kind].json_schema, "description": self.help, "x-group": self.group}
        bounds = {"minimum": self.minimum, "maximum": self.maximum}
        bounds = {name: value for name, value in bounds.items() if value is not None}
        if self.kind == "numbers":
            schema["items"] = {**schema["items"], **bounds}
        else:
            schema.update(bounds)
        if self.length is not None:
            schema |= {"minItems": self.length, "maxItems": self.length}
        return schema | ({"enum": list(self.choices)} if self.choices else {})


def leaves(value: Any) -> Iterator[Any]:
    """Yield what stands in tuples and lists inside each other, in order; of another value itself."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


def without_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON and Python have them: with None for null."""
    return {name: None if value is NULL else value for name, value in fields.items()}


def _integer(value: Any) -> int | None:
    """Take 3.0 for 3, as JSON Schema does."""
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        converted = float(value)
    except OverflowError:  # a whole number above every float
        return None
    return converted if math.isfinite(converted) else None


def _list_of(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...] | None]:
    def convert_all(value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, list | tuple) or not value:
            return None
        converted = tuple(convert(entry) for entry in value)
        return None if None in converted else converted

    return convert_all


def _string(value: Any) -> str | None:
    if not isinstance(value, str) or len(value) > MAX_PROMPT_LENGTH:
        return None
    try:
        value.encode()  # a lone surrogate is no text, and tokenizers fail on it
    except UnicodeEncodeError:
        return None
    return value


def _strings(value: Any) -> str | tuple[str, ...] | None:
    return _list_of(_string)(value) if isinstance(value, list | tuple) else _string(value)


def _nested(convert: Callable[[Any], Any], depth: int) -> Callable[[Any], Any]:
    """Take one value, or lists of them inside each other, to a depth."""

    def convert_all(value: Any, left: int = depth) -> Any:
        if not isinstance(value, list | tuple):
            return convert(value)
        if not value or not left:
            return None
        converted = tuple(convert_all(entry, left - 1) for entry in value)
        return None if any(entry is None for entry in converted) else converted

    return convert_all


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _object(value: Any) -> dict[str, Any] | None:
    return _plain(value) if isinstance(value, Mapping) else None


def _objects(value: Any) -> list[Any] | None:
    are_objects = isinstance(value, list | tuple) and value and all(isinstance(entry, Mapping) for entry in value)
    return _plain(value) if are_objects else None


def _plain(value: Any) -> Any:
    """Return a copy of plain JSON: lists, objects, texts, finite numbers, true, false, null; None if it is not that."""
    left = MAX_ENTRIES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise ValueError
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Mapping):
            return {_known(_string(key)): copied(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [copied(entry, depth + 1) for entry in value]
        if isinstance(value, str):
            return _known(_string(value))
        return _known(int(value) if isinstance(value, numbers.Integral) else _number(value))

    try:
        return copied(value, 0)
    except ValueError:
        return None


def _known(value: Any) -> Any:
    if value is None:
        raise ValueError
    return value


def _images(value: Any) -> tuple[Any, ...] | None:
    # What an image may be is decided where images are opened: this module knows neither files nor pixels.
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _pictures(value: Any, depth: int = 3) -> Any:
    """Take null for a picture in a list: of those that are to be made, some pipelines are told the place."""
    if not isinstance(value, list | tuple):
        return value
    converted = tuple(_pictures(entry, depth - 1) for entry in value) if depth else ()
    refused = [entry for entry, made in zip(value, converted, strict=False) if made is None and entry is not None]
    return None if refused or all(entry is None for entry in converted) else converted


def _frames(value: Any) -> Any:
    too_many = isinstance(value, list | tuple) and not 1 <= len(value) <= MAX_CLIP_FRAMES
    nested = isinstance(value, list | tuple) and any(isinstance(entry, list | tuple) for entry in value)
    return None if too_many or nested else tuple(value) if isinstance(value, list) else value


def _as_it_is(*types: type) -> Callable[[Any], Any]:
    """A setting stays in its dataclass as it was given: it must be of its kind already."""
    return lambda value: value if isinstance(value, types) and not isinstance(value, bool) else None


def _setting(value: Any) -> str | None:
    """Take text; what it may say, whoever uses it knows."""
    fits = isinstance(value, str) and len(value) <= MAX_SETTING_LENGTH and "\0" not in value
    return value if fits else None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: how it is described, written in JSON Schema, and converted (None: it is not of this kind)."""

    description: str
    json_schema: Mapping[str, Any]
    convert: Callable[[Any], Any]


def _array_of(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": kind}, "minItems": 1}


def _or_lists(kind: str) -> dict[str, Any]:
    return {"anyOf": [{"type": kind}, {"type": "array", "minItems": 1}]}


_DEPTH = 3
"""Of lists inside each other, where a field takes such."""
STRUCTURED = ("number or numbers", "integer or integers", "boolean or booleans", "text or texts", "object", "objects")
"""Kinds whose values may be lists in lists, or objects: as text they are JSON."""
MEDIA_KINDS = ("image", "images", "pictures", "clip")
"""Kinds whose values are files, or pixels: they travel beside what JSON can hold."""
KINDS: Mapping[str, Kind] = {
    # of parameters
    "string": Kind(f"text of at most {MAX_PROMPT_LENGTH} characters", {"type": "string"}, _string),
    "strings": Kind(
        f"text of at most {MAX_PROMPT_LENGTH} characters, or a list of such",
        {"anyOf": [{"type": "string"}, _array_of("string")]},
        _strings,
    ),
    "integer": Kind("a whole number", {"type": "integer"}, _integer),
    "number": Kind("a finite number", {"type": "number"}, _number),
    "numbers": Kind("a list of finite numbers", _array_of("number"), _list_of(_number)),
    "integers": Kind("a list of whole numbers", _array_of("integer"), _list_of(_integer)),
    "boolean": Kind("true or false", {"type": "boolean"}, _boolean),
    "texts": Kind(f"a list of texts of at most {MAX_PROMPT_LENGTH} characters", _array_of("string"), _list_of(_string)),
    **{
        f"{one} or {one}s": Kind(f"{described}, or lists of such", _or_lists(type_name), _nested(convert, _DEPTH))
        for one, described, type_name, convert in (
            ("number", "a finite number", "number", _number),
            ("integer", "a whole number", "integer", _integer),
            ("boolean", "true or false", "boolean", _boolean),
            ("text", f"text of at most {MAX_PROMPT_LENGTH} characters", "string", _string),
        )
    },
    "object": Kind("an object of plain JSON", {"type": "object"}, _object),
    "objects": Kind("a list of objects of plain JSON", _array_of("object"), _objects),
    "image": Kind("an image", {"type": "string"}, lambda value: None if isinstance(value, list | tuple) else value),
    "images": Kind("an image, or a list of images", {"type": "array", "items": {"type": "string"}}, _images),
    "pictures": Kind("an image, a list of images, or lists of such", _or_lists("string"), _pictures),
    "clip": Kind("a video, or a list of images that are its frames", _or_lists("string"), _frames),
    # of settings
    "text": Kind(f"text of at most {MAX_SETTING_LENGTH} characters without NUL", {"type": "string"}, _setting),
    "choice": Kind("text", {"type": "string"}, _as_it_is(str)),
    "count": Kind("a whole number", {"type": "integer"}, _as_it_is(int)),
    "amount": Kind("a number", {"type": "number"}, _as_it_is(int, float)),  # perhaps infinite
    "size": Kind("a size of memory", {"type": ["string", "integer"]}, lambda value: value),  # see `core/byte_sizes.py`
    "by component": Kind("names with values", {"type": "object"}, _as_it_is(Mapping)),
}


def option(kind: str, help: str, default: Any = None, **details: Any) -> Any:
    """Declare a field of a dataclass of options.

    Args:
        kind: one of the names in `KINDS`.
        help: one line for people.
        default: what it is if nobody says it; a choice is its first one then. Parameters are unset (None) until they
            are resolved.
        **details: further attributes of its `Option`.

    """
    declared = Option(kind, help, **details)
    metadata = {"option": declared}
    if kind == "choice":
        default = declared.choices[0]
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(cls: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, in order, by name."""
    return {each.name: each.metadata["option"] for each in dataclasses.fields(cls)}


def defaults_of(cls: type) -> dict[str, Any]:
    """Return what the fields of a dataclass of options are if nobody says it, by name."""
    return {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in dataclasses.fields(cls)
    }


def check_settings(settings: Any) -> None:
    """Check each field of a dataclass of settings by itself; None is taken where it is the default.

    Raises:
        InvalidParameterError: naming the field, what it got and what it takes.

    """
    defaults = defaults_of(type(settings))
    for name, known in options_of(type(settings)).items():
        value = vars(settings)[name]
        if value is not None or defaults[name] is not None:
            known.check(name, value)


def listed(choices: Sequence[str], last: str = " or ") -> str:
    """Return choices as a sentence has them."""
    return f"{', '.join(choices[:-1])}{last}{choices[-1]}"
