"""What goes between the API process and the worker: typed messages, with arrays as raw frames beside them.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight.core.architecture import Architecture
from safelight.core.form import EAGER, Form
from safelight.core.options import Option
from safelight.core.params import SamplingParams, make_params_cls
from safelight.core.registry import get_pipeline, pipelines
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.stage_memory import StageMemory
from safelight.encoded import EncodedImage
from safelight.runtime.settings import EngineSettings

SCHEMA_KEY = "x-safelight"
"""Where the JSON Schema of a request's body holds what our own client is told of a model."""
Array = NDArray[np.uint8]


class Message(msgspec.Struct, frozen=True, tag=True, tag_field="type"):
    """Base of all messages."""


class Start(Message, frozen=True):
    """To the worker, first: load the model.

    Attributes:
        settings: the engine's.
        rank: which of the processes this is that share every request.
        local_rank: which of those on this machine.
        store: name of the file through which they meet; None where `torchrun` started them.

    """

    settings: EngineSettings
    rank: int = 0
    local_rank: int = 0
    store: str | None = None


class Submit(Message, frozen=True):
    """To the worker: a request. Its images are in the frames, in the order of `images`.

    Attributes:
        request_id: unique among those that live.
        fields: the resolved parameters but for images, as JSON can hold them.
        images: (field, mode, width, height, format) of each image: the frame is its pixels, or a file of that format.
        priority: higher goes first.
        deadline: seconds from now; None is no deadline.
        form: in which it began in a worker before; None where it has not begun.

    """

    request_id: str
    fields: dict[str, Any]
    images: list[tuple[str, str, int, int, str]]
    priority: int = 0
    deadline: float | None = None
    form: Form | None = None


class Cancel(Message, frozen=True):
    """To the worker: end a request."""

    request_id: str


class Stop(Message, frozen=True):
    """To the worker: end now."""


class Loaded(Message, frozen=True):
    """From the worker: it is ready.

    Attributes:
        schema: what the model takes.
        load_seconds: what loading took.
        warm_up_seconds: what the first request took; 0 without one.

    """

    schema: WireSchema
    load_seconds: float
    warm_up_seconds: float


class LoadFailed(Message, frozen=True):
    """From the worker: the model cannot be loaded; it ends."""

    message: str
    exit_code: int


class Compiled(Message, frozen=True):
    """From the worker, once: what begins now runs compiled; or, with a reason, eagerly as before."""

    reason: str = ""


class Heartbeat(Message, frozen=True):
    """From the worker, several times a second: its process runs.

    Attributes:
        device_memory_bytes: allocated on the device; 0 on the CPU.
        positions: of the requests that wait, how many requests are before each.

    """

    device_memory_bytes: int
    positions: dict[str, int]


class Progressed(Message, frozen=True):
    """From the worker: an output of a request did a unit.

    Attributes:
        request_id: whose.
        output_index: which output.
        stage: that runs.
        step: denoising steps done of this output.
        num_inference_steps: of this output; 0 while that is not known.
        seconds_left: of this output, estimated.
        step_seconds: what the unit took, where it was a denoising step.
        batch_size: outputs that shared the unit.
        form: in which the request's model calls are made.
        shapes, dtypes: of the arrays in the frames: what there is to see beside the numbers.

    """

    request_id: str
    output_index: int
    stage: str
    step: int
    num_inference_steps: int
    seconds_left: float
    step_seconds: float | None = None
    batch_size: int = 1
    form: Form = EAGER
    shapes: list[tuple[int, ...]] = []
    dtypes: list[str] = []


class OutputMade(Message, frozen=True):
    """From the worker: an output is finished. Its media are in the frames, in the order of `shapes`.

    They are uint8, or float32 where the parameters ask for that.
    """

    request_id: str
    output_index: int
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    seed: int
    params: dict[str, Any]
    timings: dict[str, float]
    warnings: list[str]


class Failed(Message, frozen=True):
    """From the worker: a request ended without outputs.

    Attributes:
        request_id: whose.
        code: of the error's class.
        message: without internals.
        param: the parameter that it is about, if it is about one.

    """

    request_id: str
    code: str
    message: str
    param: str | None = None


class WireParams(msgspec.Struct, frozen=True):
    """What a class of parameters that no family wrote consists of: the arguments of `make_params_cls`."""

    name: str
    own: dict[str, Option]
    defaults: dict[str, Any]
    excluded: list[str]
    refused: dict[str, str]


class WireSchema(msgspec.Struct, frozen=True):
    """A `ModelSchema` on its way.

    Attributes:
        params: of a class that no family wrote; None where the registry knows the pipeline's.

    """

    model: str
    pipeline_name: str
    task: ModelTaskType
    params: WireParams | None
    defaults: dict[str, Any]
    size_multiple: int
    num_input_images: tuple[int, int]
    frame_step: int
    notes: tuple[str, ...]
    capabilities: list[str]
    solvers: dict[str, tuple[str, ...]] = {}
    architecture: Architecture | None = None
    token_bytes: int = 0
    device_bytes: int = 0
    stage_memory: tuple[StageMemory, ...] = ()


ToWorker = Start | Submit | Cancel | Stop
FromWorker = Loaded | LoadFailed | Compiled | Heartbeat | Progressed | OutputMade | Failed


def split_images(params: SamplingParams) -> tuple[dict[str, Any], list[tuple[str, Image.Image]]]:
    """Return the parameters that JSON can hold, and the images by their fields."""
    fields = params.set_fields()
    images: list[tuple[str, Image.Image]] = []
    for name, option in params.options().items():
        if name in fields and option.kind in ("image", "images"):
            value = fields.pop(name)
            images += [(name, image) for image in (value if option.kind == "images" else [value])]
    return fields, images


def join_images(
    params_cls: type[SamplingParams], fields: Mapping[str, Any], images: Sequence[tuple[str, Image.Image]]
) -> SamplingParams:
    """Return the parameters that `split_images` split; they are resolved already."""
    options = params_cls.options()
    values = {name: options[name].check(name, value) for name, value in fields.items()}
    for name, image in images:
        values[name] = (*values.get(name, ()), image) if options[name].kind == "images" else image
    return params_cls(**values)


def image_to_array(image: Image.Image) -> Array:
    """Return an image's pixels, [H, W, C]; or, of one that is encoded, its file."""
    if isinstance(image, EncodedImage):
        return np.frombuffer(image.file, np.uint8)
    return np.ascontiguousarray(image)


def described_image(name: str, image: Image.Image) -> tuple[str, str, int, int, str]:
    """Return what a message says of an image beside its bytes."""
    return (name, image.mode, image.width, image.height, image.kind if isinstance(image, EncodedImage) else "")


def array_to_image(data: bytes, mode: str, width: int, height: int, kind: str = "") -> Image.Image:
    """Return the image whose pixels these are; or, of a file, one that is decoded when its pixels are needed."""
    if kind:
        return EncodedImage(data, kind, mode, (width, height))
    return Image.frombytes(mode, (width, height), data)


def schema_to_wire(schema: ModelSchema) -> WireSchema:
    """Return what of a schema another process needs."""
    shared = {name: value for name, value in vars(schema).items() if name != "params_cls"}
    shared |= {"defaults": dict(schema.defaults), "capabilities": sorted(schema.capabilities)}
    known = schema.pipeline_name in pipelines()
    return WireSchema(params=None if known else _params_to_wire(schema.params_cls), **shared)


def schema_from_wire(wire: WireSchema) -> ModelSchema:
    """Return the schema that the worker published."""
    params_cls = get_pipeline(wire.pipeline_name).sampling_param_cls() if wire.params is None else _made(wire.params)
    options = params_cls.options()
    shared = {name: value for name, value in msgspec.structs.asdict(wire).items() if name != "params"}
    shared["defaults"] = {name: options[name].check(name, value) for name, value in wire.defaults.items()}
    shared["capabilities"] = frozenset(wire.capabilities)
    return ModelSchema(params_cls=params_cls, **shared)


def _params_to_wire(params_cls: type[SamplingParams]) -> WireParams:
    common = {field.name for field in dataclasses.fields(SamplingParams)}
    own = {name: known for name, known in params_cls.options().items() if name not in common}
    return WireParams(
        params_cls.__name__, own, dict(params_cls.defaults), sorted(params_cls.excluded), dict(params_cls.refused)
    )


def _made(wire: WireParams) -> type[SamplingParams]:
    excluded = frozenset(wire.excluded)
    return make_params_cls(wire.name, wire.own, defaults=wire.defaults, excluded=excluded, refused=wire.refused)
