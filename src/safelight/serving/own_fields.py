"""The API's own fields, which go before the model's of the same name: what they are called, and what they take."""

from __future__ import annotations

from collections.abc import Mapping

from safelight.core.options import Option
from safelight.core.schema import ModelSchema
from safelight.serving.limits import Limits
from safelight.serving.principals import LEAST_PRIORITY, MOST_PRIORITY

QUALITIES: Mapping[str, float] = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
"""Steps, in the model's default number of them."""
QUALITY_NAMES: Mapping[str, str] = {"standard": "medium", "hd": "high"}
"""Other names of qualities, from before there were these."""
EFFECTLESS = ("moderation", "style", "user", "safety_identifier")
"""Accepted, so that clients written for other servers work, and named in the warnings."""
INPUT_FIDELITY = "input_fidelity"
"""Likewise, where pictures are edited: a model here keeps of them what it keeps."""
IMAGES = "images"
"""The API's name for the pictures to edit, in JSON."""
INPUT_REFERENCE = "input_reference"
"""The API's name for the picture that a video begins with."""
_EFFECTLESS_OPTION = Option("string", "accepted, without effect")
_OF_ALL: Mapping[str, Option] = {
    "prompt": Option("string", "what to generate", group="basic"),
    "model": Option("string", "the served model's name, or another name of it"),
    "size": Option("string", "auto, or WxH in pixels", group="basic"),
    "priority": Option(
        "integer", "higher goes first; a key has its highest", minimum=LEAST_PRIORITY, maximum=MOST_PRIORITY
    ),
    **dict.fromkeys(EFFECTLESS, _EFFECTLESS_OPTION),
}
_OF_EDITS: Mapping[str, Option] = {
    IMAGES: Option("images", "the input images: data URLs, or objects with image_url", group="basic"),
    INPUT_FIDELITY: _EFFECTLESS_OPTION,
}
VIDEO_FIELDS: Mapping[str, Option] = {
    **_OF_ALL,
    "seconds": Option("number", "length; fitted to the model's rule for frames", "basic", 0.01, 3600.0),
    "n": Option("integer", "videos of one request", "advanced", 1, 1),
    INPUT_REFERENCE: Option("image", "the picture that the video begins with", group="basic"),
}


def own_fields(schema: ModelSchema, limits: Limits) -> Mapping[str, Option]:
    """Return the API's own fields for what a model makes."""
    return VIDEO_FIELDS if schema.task.lasts else image_fields(limits, takes_pictures(schema))


def takes_pictures(schema: ModelSchema) -> bool:
    """Say whether there is a field for input pictures."""
    return "image" in schema.params_cls.options()


def image_fields(limits: Limits, edits: bool = True) -> dict[str, Option]:
    """Return the API's own fields for pictures, by name; those of edits are for models that take pictures."""
    return {
        **_OF_ALL,
        "n": Option("integer", "pictures, with seeds seed, seed+1 and so on", "basic", 1, limits.outputs),
        "quality": Option("string", "a preset of steps", choices=(*QUALITIES, *QUALITY_NAMES, "auto")),
        "output_format": Option("string", "of the picture's file", choices=("png", "jpeg", "webp")),
        "output_compression": Option("integer", "quality of jpeg and webp; png has 100", "advanced", 0, 100),
        "background": Option("string", "of the picture", choices=("transparent", "opaque", "auto")),
        "response_format": Option("string", "how pictures are returned", choices=("b64_json", "url")),
        "stream": Option("boolean", "answer with server-sent events"),
        "partial_images": Option("integer", "previews in a stream", "advanced", 0, 3),
        **(_OF_EDITS if edits else {}),
    }
