"""From a request's fields to resolved parameters: the API's own fields, and the loaded model's, each checked once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from safelight.clips import EncodedClip
from safelight.core.options import MAX_CLIP_FRAMES, MEDIA_KINDS, STRUCTURED, Option, leaves
from safelight.core.package_params import PackageParams
from safelight.core.params import SamplingParams
from safelight.core.placed import Place, joined, placed
from safelight.core.schema import ModelSchema
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError, UnknownParameterError, UsageError
from safelight.preparation import prepare
from safelight.serving.http.bodies import Body
from safelight.serving.http.forms import Repeated, about
from safelight.serving.http.json_body import read_number, read_value
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
from safelight.serving.trial import open_input

NOT_OFFERED: Mapping[str, str] = {"output_type": "use output_format"}
OUTPUT_TYPE = "pil"
"""What the engine gives, whatever the model's default is: pixels of 8 bits."""
REFUSED: Mapping[str, str] = {**NOT_OFFERED, "mask": "this model cannot use a mask"}
"""What is not taken, and what to say of it."""
_LISTS = (*MEDIA_KINDS, "numbers", "integers", "texts", "strings", *STRUCTURED)
"""Kinds of fields that parts of one name may fill together."""
NOTHING = b""
"""The file of what is null in a list of pictures."""
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
        pictures: the files of input pictures and clips, by field, one after another.
        places: of each of them, in the lists that the field has.

    """

    schema: ModelSchema
    own: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[bytes | Stored]] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)


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
    pictures: list[tuple[str, EncodedImage | EncodedClip]] = field(default_factory=list)

    @property
    def schema(self) -> ModelSchema:
        """The model's."""
        return self.asked.schema

    @property
    def images(self) -> dict[str, list[bytes | Stored]]:
        """The files of input pictures, by the model's field."""
        return {_target(name, self.schema): files for name, files in self.asked.pictures.items()}

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return int(self.asked.own.get("priority", 0))

    @property
    def output_format(self) -> str:
        """Of the files that are made: png, jpeg, webp, mp4 or wav."""
        made = "mp4" if self.schema.task.makes_video else "wav" if self.schema.task.lasts else "png"
        return str(self.asked.own.get("output_format", made))

    @property
    def quality(self) -> str:
        """The preset nearest to the steps that are done."""
        usual = self.schema.defaults_for(self.params.set_fields()).get("num_inference_steps")
        if not usual:
            return "medium"
        steps = self.params.num_inference_steps or self.params.num_steps()  # of some solvers a step is two calls
        return min(QUALITIES, key=lambda name: abs(QUALITIES[name] * usual - steps))

    @property
    def background(self) -> str:
        """What the pictures have behind them."""
        return "transparent" if self.schema.params_cls.makes_alpha else "opaque"


def model_fields(schema: ModelSchema) -> dict[str, Option]:
    """Return what a client may ask of a model, by name: one text or several is one text here.

    Of a pipeline's own fields, whose lists are not of prompts, it is what it is.
    """
    common, cls = SamplingParams.options(), schema.params_cls
    return {
        name: dataclasses.replace(option, kind="string")
        if option.kind == "strings" and (name in common or not issubclass(cls, PackageParams))
        else option
        for name, option in schema.options().items()
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
    asked = Asked(schema)
    for name, value in body.fields.items():
        option = _known(name, value, known, schema.params_cls)
        if option is None or (value is None and not (option.nullable and name not in own)):
            continue
        if isinstance(value, Repeated) and option.kind not in _LISTS:
            raise about(name, "is given twice")
        if option.kind in MEDIA_KINDS and value is not None:
            found = list(_pictures(name, option, value, limits))
            asked.places[name], asked.pictures[name] = [place for place, _ in found], [data for _, data in found]
        else:
            place = asked.own if name in own and name not in _PASSED_ON else asked.model
            place[name] = _checked(name, option, _of_form(option, value) if body.is_form else value)
    _check_prompt(asked)
    return asked


def _known(name: str, value: Any, known: Mapping[str, Option], cls: type[SamplingParams]) -> Option | None:
    """Return what a field of a request is; None of one that the model has not, where it is null all the same.

    Raises:
        UnknownParameterError: if there is none of that name, with why, if that is known.

    """
    option = known.get(cls.aliases.get(name, name))
    refused = {**REFUSED, **cls.refused}
    if option is None and not (name in refused and value is None):
        raise UnknownParameterError(name, known, refused.get(name))
    return option


def _check_prompt(asked: Asked) -> None:
    """Refuse a request without text, or with a blank one, where the model needs it."""
    cls, prompt = asked.schema.params_cls, asked.model.get("prompt")
    needs_text = cls.needs_prompt and "prompt" in cls.options() and "prompt" not in asked.schema.defaults
    if needs_text and not (prompt or "").strip():
        raise InvalidParameterError("prompt", prompt, "text that is not blank")


def _pictures(name: str, option: Option, value: Any, limits: Limits) -> Iterator[tuple[Place, bytes | Stored]]:
    values = list(value) if isinstance(value, list) else value
    if option.kind == "image" and isinstance(values, list) and len(values) == 1:
        (values,) = values
    found = list(placed(values if option.kind == "image" else option.check(name, values)))
    most = {"image": 1, "clip": MAX_CLIP_FRAMES}.get(option.kind, limits.images)
    if not 1 <= len(found) <= most:
        raise InvalidParameterError(name, f"{len(found)} images", f"1 to {most}")
    if option.kind == "clip":
        limits = dataclasses.replace(limits, image_bytes=limits.clip_bytes)
    return ((place, _file(entry, name, option, limits)) for place, entry in found)


def _file(value: Any, name: str, option: Option, limits: Limits) -> bytes | Stored:
    """Return a picture's file; nothing for null, in the place of a picture in a field's lists."""
    if value is None and option.kind == "pictures":
        return NOTHING
    data = picture_bytes(value, name, limits)
    if not len(data):
        raise InvalidParameterError(name, "an empty file", "a PNG, JPEG or WebP file of one picture")
    return data


def _of_form(option: Option, value: Any) -> Any:
    """Read a form's text as its field's kind; the word null is null, where that is a value and no text is one."""
    if option.nullable and value == "null" and option.kind not in ("string", "strings"):
        return None
    return typed(option.kind, value)


def typed(kind: str, value: Any) -> Any:
    """Read a form's text as the kind that its field has; what cannot be read stays text, and is refused as such."""
    if kind in ("numbers", "integers", "texts"):
        one = {"numbers": "number", "integers": "integer", "texts": "text"}[kind]
        return [typed(one, entry) for entry in (value if isinstance(value, list) else [value])]
    if kind in STRUCTURED:
        return _structured(value)
    if not isinstance(value, str):
        return value
    if kind in ("integer", "number") and _NUMBER.fullmatch(value):
        return read_number(value)
    return {"true": True, "false": False}.get(value, value) if kind == "boolean" else value


def _structured(value: Any) -> Any:
    """Read numbers, true, false, null and JSON in a form's texts, in whatever lists and objects they stand."""
    if isinstance(value, list):
        return [_structured(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _structured(entry) for name, entry in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):
        return read_value(value)
    words = {"true": True, "false": False, "null": None}
    return read_number(value) if _NUMBER.fullmatch(value) else words.get(value, value)


def _scalars(value: Any) -> Iterator[Any]:
    """Yield what stands in lists and objects, the names in these too."""
    if isinstance(value, Mapping):
        yield from value
    for entry in value.values() if isinstance(value, Mapping) else leaves(value):
        yield from _scalars(entry) if isinstance(entry, Mapping | list | tuple) else (entry,)


def _checked(name: str, option: Option, value: Any) -> Any:
    checked = option.check(name, value)
    scalars = list(_scalars(checked))
    if any(isinstance(entry, str) and "\0" in entry for entry in scalars):
        raise InvalidParameterError(name, value, "text without NUL")
    if option.kind not in ("integer", "integers") and any(
        isinstance(entry, int | float) and abs(entry) > MAX_NUMBER for entry in scalars
    ):
        raise InvalidParameterError(name, value, f"a number from {-MAX_NUMBER:g} to {MAX_NUMBER:g}")
    return checked


def resolve(asked: Asked, limits: Limits) -> Resolved:
    """Resolve all fields together; of pictures the headers alone are read. Of large ones: run it in a thread.

    Raises:
        UsageError: naming the field.

    """
    schema, model = asked.schema, dict(asked.model)
    options = schema.params_cls.options()
    pictures: list[tuple[str, EncodedImage | EncodedClip]] = []
    for name, files in asked.pictures.items():
        if (target := _target(name, schema)) in model or target not in options:
            takes = (
                "nothing, where another field has the image" if target in options else "nothing: this model has no use"
            )
            raise InvalidParameterError(name, "an image", takes)
        opened = open_input if options[target].kind == "clip" else open_picture
        images = [opened(data, name, limits) if len(data) else None for data in files]
        pictures += [(name, image) for image in images if image is not None]
        model[target] = joined(list(zip(asked.places[name], images, strict=True)))
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
    converted = [
        (name, image.converted(params.mode_of(_target(name, schema))) if isinstance(image, EncodedImage) else image)
        for name, image in pictures
    ]
    return Resolved(asked, params, warnings, converted)


def _target(name: str, schema: ModelSchema) -> str:
    """Return the model's field that a field is for: the API has other names of `image`."""
    is_models_own = name in schema.params_cls.options()
    return "image" if name in (INPUT_REFERENCE, IMAGES) and not is_models_own else name


def _size_fields(size: str, model: Mapping[str, Any], schema: ModelSchema) -> dict[str, int]:
    """Return height and width as `size` has them, or as the input picture's aspect has them; or leave them unset."""
    given = [name for name in ("height", "width") if name in model]
    if size == "auto":
        if given or not model.get("image"):
            return {}
        # A video begins with its first picture; an edited picture is, as in Diffusers, of the last one's aspect.
        images = [each for each in leaves(model["image"]) if each is not None]
        image = images[0 if schema.task.makes_video else -1]
        return _input_aspect(image, schema.defaults_for(model), schema)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidParameterError("size", size, "auto, or WxH in pixels, such as 1024x1024")
    if given:
        raise InvalidParameterError("size", size, f"auto, or nothing, where {' and '.join(given)} are given")
    if "height" not in schema.params_cls.options():
        raise InvalidParameterError("size", size, "auto: this model's size is its input picture's")
    return {"height": int(match[2]), "width": int(match[1])}


def _input_aspect(image: Image.Image, defaults: Mapping[str, Any], schema: ModelSchema) -> dict[str, int]:
    """Return about the pixels of the model's default, at the aspect of a picture.

    Models that fit sizes themselves are given the picture's own; those without a default size do it all themselves.
    """
    width, height = image.size
    if defaults.get("height") is None or defaults.get("width") is None:
        return {}
    if schema.params_cls.fits_size:
        return {"height": height, "width": width}
    area, multiple = defaults["height"] * defaults["width"], _size_step(defaults, schema)
    sides = {"height": math.sqrt(area * height / width), "width": math.sqrt(area * width / height)}
    return {name: max(1, round(side / multiple)) * multiple for name, side in sides.items()}


def _size_step(defaults: Mapping[str, Any], schema: ModelSchema) -> int:
    """Return a number whose multiples the model takes as heights and widths.

    A pipeline of the diffusers package does not say its own. Then it is the largest power of two, up to 64, that both
    of its default sides are multiples of.
    """
    if schema.size_multiple > 1:
        return schema.size_multiple
    return math.gcd(defaults["height"], defaults["width"], _MAX_SIZE_STEP)


def _quality_fields(quality: str, model: Mapping[str, Any], schema: ModelSchema) -> dict[str, int]:
    if quality == "auto":
        return {}
    usual = schema.defaults_for(model).get("num_inference_steps")
    option = schema.params_cls.options().get("num_inference_steps")
    if not usual or option is None:
        raise InvalidParameterError("quality", quality, "auto: this model's steps are fixed")
    if "num_inference_steps" in model:
        raise InvalidParameterError("quality", quality, "auto, or nothing, where num_inference_steps is given")
    steps = max(1, round(QUALITIES[QUALITY_NAMES.get(quality, quality)] * usual))
    return {"num_inference_steps": min(steps, int(option.maximum or steps))}
