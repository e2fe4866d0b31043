"""Sampling parameters made from the signature of a Diffusers pipeline's `__call__`."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from safelight.core.options import Option
from safelight.core.params import SamplingParams, make_params_cls
from safelight.errors import InvalidParameterError, ModelIndexError

if TYPE_CHECKING:
    from safelight.core.schema import ModelSchema

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
OURS = frozenset({"seed", "n", "output_type"})
"""Common fields that every pipeline has here: each is called with a generator, once an output, for arrays."""
NEEDED = ("generator", "output_type")
"""What a pipeline's call must take to be run here."""
UNSTATED_SIDE, TOKEN_SIDE, FRAMES_OF_A_TOKEN = 1024, 16, 8
"""Pixels of a side that the call leaves to the model, and of a latent token's, and its frames: for the estimate of a
request's cost."""
LONG_TEXT = " ".join(["a"] * 1024)
"""As long as any call takes it: it is cut to the length that the call takes."""
EXAMPLES: Mapping[str, Any] = {
    "string": "a",
    "strings": "a",
    "integer": 1,
    "number": 1.0,
    "boolean": True,
    "numbers": [1.0],
    "integers": [1],
}
"""By kind, a value that most calls take."""
REFUSED = {"batch_size": "use n", "callback": "use stream(), which yields after every step"}
"""Arguments of older pipelines that are done otherwise here, and how."""


class PackageParams(SamplingParams):
    """Parameters of a pipeline of the package, whose model alone knows its own size and multiples."""

    required: ClassVar[frozenset[str]] = frozenset()
    """What the call has no default for."""

    def validate(self, schema: ModelSchema, given: Mapping[str, Any]) -> None:
        """Check that what the call cannot do without is there."""
        super().validate(schema, given)
        for name in sorted(self.required):
            if vars(self)[name] is None:
                raise InvalidParameterError(name, None, self.options()[name].takes())

    @classmethod
    def example_fields(cls, height: int, width: int) -> dict[str, Any]:
        """Return what the call cannot do without, and a text: a long one where it is cut to a length."""
        options = cls.options()
        needed = {name: options[name].kind for name in cls.required & options.keys()}
        blank = Image.new("RGB", (width, height), (128, 128, 128))
        given = {name: blank if kind in ("image", "images") else EXAMPLES[kind] for name, kind in needed.items()}
        text = LONG_TEXT if any("sequence_length" in name for name in options) else "a"
        return {**given, "prompt": text} if "prompt" in options else given

    def output_size(self, size_multiple: int) -> tuple[int, int]:
        """Return (height, width) in pixels; a guess where the call does not say: its first image's, if it has one."""
        image = self.image[0] if self.image else None
        height, width = (UNSTATED_SIDE, UNSTATED_SIDE) if image is None else (image.height, image.width)
        return self.height or height, self.width or width

    def num_latent_tokens(self, schema: ModelSchema) -> int:
        """Return an estimate of an output's tokens; VAEs of videos make one latent frame of four or of eight."""
        height, width = self.output_size(schema.size_multiple)
        num_frames = 1 + ((self.num_frames or 1) - 1) // FRAMES_OF_A_TOKEN
        return -(-height // TOKEN_SIDE) * -(-width // TOKEN_SIDE) * num_frames


def params_from_signature(call: Callable[..., Any], name: str) -> type[SamplingParams]:
    """Return a dataclass of what may be asked of a pipeline, named after it.

    Args:
        call: its `__call__`.
        name: of the pipeline.

    Raises:
        ModelIndexError: for a pipeline that cannot be called with what can be asked for.

    """
    given = {key: value for key, value in parameters_of(call).items() if key not in ("self", "kwargs")}
    kinds = askable(given)
    required = {key for key, value in given.items() if value.default is inspect.Parameter.empty}
    check_callable(name, given.keys(), required - kinds.keys())
    common = {field.name for field in dataclasses.fields(SamplingParams)}
    aliases = SamplingParams.aliases
    own = [key for key in kinds if key not in common and key not in aliases and key not in SamplingParams.refused]
    kept = common & kinds.keys() | OURS | ({"fps"} if "num_frames" in kinds else set())
    defaults = {key: value.default for key, value in given.items() if key in kinds and _states(value)}
    if "num_frames" in kinds:
        defaults.setdefault("fps", defaults.get("frame_rate", DEFAULT_FPS))
    refused = dict.fromkeys(given.keys() - kinds.keys(), "it is not supported through the diffusers package")
    made = make_params_cls(
        f"{name.removesuffix('Pipeline')}SamplingParams",
        {**{key: Option(kinds[key], f"{key} of {name}") for key in own}, **_output_type(call)},
        defaults={**SamplingParams.defaults, **{key: defaults[key] for key in defaults.keys() & {*own, *kept}}},
        excluded=frozenset(common - kept),
        refused={**refused, **SamplingParams.refused, **REFUSED},
        base=PackageParams,
    )
    made.required = frozenset(required)  # type: ignore[attr-defined]
    return made


def askable(given: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """Return the kinds of those parameters that can be asked for."""
    kinds = {
        key: kind
        for key, value in given.items()
        if (kind := kind_of(value.annotation)) is not None
        and "ip_adapter" not in key  # none is ever loaded
        and key not in REFUSED
    }
    return {**kinds, "prompt": "strings"} if "prompt" in given else kinds  # whatever else it may be


def check_callable(name: str, given: Collection[str], missing: Collection[str]) -> None:
    """Refuse a pipeline that takes no generator, say, or that needs what cannot be asked for."""
    lacking = [key for key in NEEDED if key not in given]
    if lacking or missing:
        needs = f"its call takes no {' and no '.join(lacking)}" if lacking else ""
        needs = needs or f"it needs {', '.join(sorted(missing))}, which cannot be asked for here"
        raise ModelIndexError(f"model_index.json: pipeline class {name!r} cannot be run: {needs}")


def parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return a call's parameters; annotations that are text as what they stand for, where that can be known."""
    try:
        return inspect.signature(call, eval_str=True).parameters
    except (NameError, TypeError):  # of what is imported for type checkers alone, or unions with text
        return inspect.signature(call).parameters


def _output_type(call: Callable[..., Any]) -> dict[str, Option]:
    """Return the option for the form of the result, where it is not the common one: a call that knows no latents.

    Such a call would return pixels for latents: whether it asks for the word is seen in its code.
    """
    if "latent" in inspect.unwrap(call).__code__.co_consts:
        return {}
    common = SamplingParams.options()["output_type"]
    forms = tuple(form for form in common.choices if form != "latent")
    return {"output_type": dataclasses.replace(common, choices=forms)}


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
