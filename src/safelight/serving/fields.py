"""From a request's fields to resolved parameters: the API's own fields, and the loaded model's, each checked once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from safelight.core.options import Option
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.preparation import prepare
from safelight.serving.http.bodies import Body
from safelight.serving.http.forms import Repeated, about
from safelight.serving.http.json_body import read_number
from safelight.serving.http.spool import Stored
from safelight.serving.input_pictures import open_picture, picture_bytes
from safelight.serving.limits import Limits
from safelight.serving.own_fields import (
    EFFECTLESS,
    IMAGES,
    INPUT_FIDELITY,
    INPUT_REFERENCE,
    QUALITIES,
    QUALITY_NAMES,
    own_fields,
)

NOT_OFFERED: Mapping[str, str] = {"output_type": "use output_format"}
OUTPUT_TYPE = "pil"
"""What the engine gives, whatever the model's default is: pixels of 8 bits."""
REFUSED: Mapping[str, str] = {**NOT_OFFERED, "mask": "this model cannot use a mask"}
"""What is not taken, and what to say of it."""
_LISTS = ("image", "images", "numbers", "integers")
"""Kinds of fields that parts of one name may fill together."""
MAX_NUMBER = 1e6
"""Of what is not a whole number: guidance beyond it overflows in half precision."""
_MAX_SIZE_STEP = 64
_PASSED_ON = ("prompt", "n")
"""Fields of the API that are the model's too, with other bounds."""
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Asked:
    """A request's fields, each of its kind, but not yet resolved against each other.

    Attributes:
        schema: of the model that was loaded when it came.
        own: the API's own fields, by name; what is unset or null is not there.
        model: the model's.
        pictures: the files of input pictures, by field.

    """

    schema: ModelSchema
    own: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[bytes | Stored]] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A request as it will be run.

    Attributes:
        asked: the fields that it came from.
        params: resolved, with a seed, and pictures that are decoded where they are used.
        warnings: what the user should know.
        pictures: of them all, with the field of each, of which nothing has been decoded.

    """

    asked: Asked
    params: SamplingParams
    warnings: list[str]
    pictures: list[tuple[str, EncodedImage]] = field(default_factory=list)

    @property
    def schema(self) -> ModelSchema:
        """The model's."""
        return self.asked.schema

    @property
    def images(self) -> dict[str, list[bytes | Stored]]:
        """The files of input pictures, by the model's field."""
        return {_target(name): files for name, files in self.asked.pictures.items()}

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return int(self.asked.own.get("priority", 0))

    @property
    def output_format(self) -> str:
        """Of the files that are made: png, jpeg, webp, or mp4."""
        made = "mp4" if self.schema.task.makes_video else "png"
        return str(self.asked.own.get("output_format", made))

    @property
    def quality(self) -> str:
        """The preset nearest to the steps that are done."""
        usual = self.schema.defaults.get("num_inference_steps")
        if not usual:
            return "medium"
        steps = self.params.num_inference_steps or self.params.num_steps()  # of some solvers a step is two calls
        return min(QUALITIES, key=lambda name: abs(QUALITIES[name] * usual - steps))

    @property
    def background(self) -> str:
        """What the pictures have behind them."""
        return "transparent" if self.schema.params_cls.makes_alpha else "opaque"


def model_fields(schema: ModelSchema) -> dict[str, Option]:
    """Return what a client may ask of a model, by name: one text or several is one text here."""
    options = schema.params_cls.options().items()
    return {
        name: dataclasses.replace(option, kind="string") if option.kind == "strings" else option
        for name, option in options
        if name not in NOT_OFFERED
    }


def sort_fields(body: Body, schema: ModelSchema, limits: Limits) -> Asked:
    """Check each field by itself, and sort the API's from the model's. Of a large body: run it in a thread.

    Args:
        body: as it was parsed.
        schema: of the loaded model.
        limits: the bounds.

    Raises:
        UsageError: naming the field.

    """
    own = own_fields(schema, limits)
    known = {**model_fields(schema), **own}
    cls = schema.params_cls
    asked = Asked(schema)
    for name, value in body.fields.items():
        option = known.get(cls.aliases.get(name, name))
        if option is None:
            refused = {**REFUSED, **cls.refused}
            if name in refused and value is None:
                continue
            raise UnknownParameterError(name, known, refused.get(name))
        if value is None:
            continue
        if isinstance(value, Repeated) and option.kind not in _LISTS:
            raise about(name, "is given twice")
        if option.kind in ("image", "images"):
            asked.pictures[name] = list(_pictures(name, option, value, limits))
        else:
            place = asked.own if name in own and name not in _PASSED_ON else asked.model
            place[name] = _checked(name, option, typed(option.kind, value) if body.is_form else value)
    needs_text = "prompt" in cls.options() and "prompt" not in schema.defaults
    if needs_text and not asked.model.get("prompt", "").strip():
        raise InvalidParameterError("prompt", asked.model.get("prompt"), "text that is not blank")
    return asked


def _pictures(name: str, option: Option, value: Any, limits: Limits) -> Iterator[bytes | Stored]:
    values = value if isinstance(value, list) else [value]
    most = limits.images if option.kind == "images" else 1
    if not 1 <= len(values) <= most:
        raise InvalidParameterError(name, f"{len(values)} images", f"1 to {most}")
    return (picture_bytes(entry, name, limits) for entry in values)


def typed(kind: str, value: Any) -> Any:
    """Read a form's text as the kind that its field has; what cannot be read stays text, and is refused as such."""
    if kind in ("numbers", "integers"):
        one = {"numbers": "number", "integers": "integer"}[kind]
        return [typed(one, entry) for entry in (value if isinstance(value, list) else [value])]
    if not isinstance(value, str):
        return value
    if kind in ("integer", "number") and _NUMBER.fullmatch(value):
        return read_number(value)
    return {"true": True, "false": False}.get(value, value) if kind == "boolean" else value


def _checked(name: str, option: Option, value: Any) -> Any:
    checked = option.check(name, value)
    if isinstance(checked, str) and "\0" in checked:
        raise InvalidParameterError(name, value, "text without NUL")
    numbers = checked if isinstance(checked, tuple) else (checked,)
    if option.kind in ("number", "numbers") and any(abs(number) > MAX_NUMBER for number in numbers):
        raise InvalidParameterError(name, value, f"a number from {-MAX_NUMBER:g} to {MAX_NUMBER:g}")
    return checked


def resolve(asked: Asked, limits: Limits) -> Resolved:
    """Resolve all fields together; of pictures the headers alone are read. Of large ones: run it in a thread.

    Raises:
        UsageError: naming the field.

    """
    schema, model = asked.schema, dict(asked.model)
    options = schema.params_cls.options()
    pictures: list[tuple[str, EncodedImage]] = []
    for name, files in asked.pictures.items():
        if (target := _target(name)) in model or target not in options:
            takes = (
                "nothing, where another field has the image" if target in options else "nothing: this model has no use"
            )
            raise InvalidParameterError(name, "an image", takes)
        images = [open_picture(data, name, limits) for data in files]
        pictures += [(name, image) for image in images]
        model[target] = images if options[target].kind == "images" else images[0]
    size = asked.own.get("size", "auto")
    model.update(_size_fields(size, model, schema))
    model["output_type"] = OUTPUT_TYPE
    model.update(_quality_fields(asked.own.get("quality", "auto"), model, schema))
    try:
        params, warnings = prepare(schema, model)
    except UsageError as error:
        if error.param in ("height", "width") and size != "auto":
            raise InvalidParameterError.rebuilt(f"size: got {size!r}; {error}", "size") from error
        raise
    warnings += [f"{name} has no effect" for name in (*EFFECTLESS, INPUT_FIDELITY) if name in asked.own]
    converted = [(name, image.converted(params.image_mode)) for name, image in pictures]
    return Resolved(asked, params, warnings, converted)


def _target(name: str) -> str:
    return "image" if name in (INPUT_REFERENCE, IMAGES) else name


def _size_fields(size: str, model: Mapping[str, Any], schema: ModelSchema) -> dict[str, int]:
    """Return height and width as `size` has them, or as the input picture's aspect has them; or leave them unset."""
    given = [name for name in ("height", "width") if name in model]
    if size == "auto":
        if given or not model.get("image"):
            return {}
        # A video begins with its first picture; an edited picture is, as in Diffusers, of the last one's aspect.
        return _input_aspect(model["image"][0 if schema.task.makes_video else -1], schema)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidParameterError("size", size, "auto, or WxH in pixels, such as 1024x1024")
    if given:
        raise InvalidParameterError("size", size, f"auto, or nothing, where {' and '.join(given)} are given")
    if "height" not in schema.params_cls.options():
        raise InvalidParameterError("size", size, "auto: this model's size is its input picture's")
    return {"height": int(match[2]), "width": int(match[1])}


def _input_aspect(image: Image.Image, schema: ModelSchema) -> dict[str, int]:
    """Return about the pixels of the model's default, at the aspect of a picture.

    Models that fit sizes themselves are given the picture's own; those without a default size do it all themselves.
    """
    width, height = image.size
    if schema.defaults.get("height") is None or schema.defaults.get("width") is None:
        return {}
    if schema.params_cls.fits_size:
        return {"height": height, "width": width}
    area, multiple = schema.defaults["height"] * schema.defaults["width"], _size_step(schema)
    sides = {"height": math.sqrt(area * height / width), "width": math.sqrt(area * width / height)}
    return {name: max(1, round(side / multiple)) * multiple for name, side in sides.items()}


def _size_step(schema: ModelSchema) -> int:
    """Return a number whose multiples the model takes as heights and widths.

    A pipeline of the diffusers package does not say its own. Then it is the largest power of two, up to 64, that both
    of its default sides are multiples of.
    """
    if schema.size_multiple > 1:
        return schema.size_multiple
    return math.gcd(schema.defaults["height"], schema.defaults["width"], _MAX_SIZE_STEP)


def _quality_fields(quality: str, model: Mapping[str, Any], schema: ModelSchema) -> dict[str, int]:
    if quality == "auto":
        return {}
    usual, option = schema.defaults.get("num_inference_steps"), schema.params_cls.options().get("num_inference_steps")
    if not usual or option is None:
        raise InvalidParameterError("quality", quality, "auto: this model's steps are fixed")
    if "num_inference_steps" in model:
        raise InvalidParameterError("quality", quality, "auto, or nothing, where num_inference_steps is given")
    steps = max(1, round(QUALITIES[QUALITY_NAMES.get(quality, quality)] * usual))
    return {"num_inference_steps": min(steps, int(option.maximum or steps))}
