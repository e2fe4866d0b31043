"""What goes between the API process and the worker: typed messages, with arrays as raw frames beside them.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safelight.clips import EncodedClip
from safelight.core.architecture import Architecture
from safelight.core.form import EAGER, Form
from safelight.core.options import MEDIA_KINDS, Option, without_null
from safelight.core.package_params import PackageParams, make_params_cls
from safelight.core.params import SamplingParams
from safelight.core.placed import Place, joined, placed
from safelight.core.registry import get_pipeline
from safelight.core.schema import ModelSchema, ModelTaskType
from safelight.core.stage_memory import StageMemory
from safelight.core.tasks import Task
from safelight.core.tenant import NOBODY, Tenant
from safelight.encoded import EncodedImage
from safelight.runtime.settings import EngineSettings

SCHEMA_KEY = "x-safelight"
"""Where the JSON Schema of a request's body holds what our own client is told of a model."""
Array = NDArray[np.uint8]
Input = Image.Image | EncodedClip | None
"""An image, a clip, or nothing, in the place of an image in a list."""


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


class Pictured(msgspec.Struct, frozen=True):
    """What a message says of an image, or of a video that is an input, beside its bytes.

    Attributes:
        param: the field.
        place: in the field's lists.
        mode: of its pixels.
        width, height: in pixels.
        kind: the format of a file; empty where the bytes are pixels.
        num_frames: of a video; 0 of an image.

    """

    param: str
    place: Place
    mode: str
    width: int
    height: int
    kind: str = ""
    num_frames: int = 0


class Submit(Message, frozen=True):
    """To the worker: a request. Its images are in the frames, in the order of `images`.

    Attributes:
        request_id: unique among those that live.
        fields: the resolved parameters but for images, as JSON can hold them.
        images: of each image, and each clip: the frame is its pixels, or its file.
        priority: higher goes first.
        deadline: seconds from now; None is no deadline.
        form: in which it began in a worker before; None where it has not begun.
        tenant: whose it is.

    """

    request_id: str
    fields: dict[str, Any]
    images: list[Pictured]
    priority: int = 0
    deadline: float | None = None
    form: Form | None = None
    tenant: Tenant = NOBODY


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
    """From the worker: an output is finished. Its media are in the frames, in the order of `shapes`, sounds last.

    They are uint8, or float32 where the parameters ask for that, as sounds always are; `rates` are those of the sounds.
    """

    request_id: str
    output_index: int
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    seed: int
    params: dict[str, Any]
    timings: dict[str, float]
    warnings: list[str]
    rates: list[int] = []


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
    """What a class of parameters that no family wrote consists of: arguments of `make_params_cls`, and its tasks."""

    name: str
    own: dict[str, Option]
    defaults: dict[str, Any]
    excluded: list[str]
    refused: dict[str, str]
    tasks: tuple[Task, ...] = ()


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
    task_solvers: dict[str, dict[str, tuple[str, ...]]] = {}
    architecture: Architecture | None = None
    token_bytes: int = 0
    device_bytes: int = 0
    stage_memory: tuple[StageMemory, ...] = ()


ToWorker = Start | Submit | Cancel | Stop
FromWorker = Loaded | LoadFailed | Compiled | Heartbeat | Progressed | OutputMade | Failed


def split_images(params: SamplingParams) -> tuple[dict[str, Any], list[tuple[str, Place, Input]]]:
    """Return the parameters that JSON can hold, and the images and clips by field and place."""
    fields = without_null(params.set_fields())
    images: list[tuple[str, Place, Input]] = []
    for name, option in params.options().items():
        if option.kind in MEDIA_KINDS and fields.get(name) is not None:
            images += [(name, place, image) for place, image in placed(fields.pop(name))]
    return fields, images


def join_images(
    params_cls: type[SamplingParams], fields: Mapping[str, Any], images: Sequence[tuple[str, Place, Input]]
) -> SamplingParams:
    """Return the parameters that `split_images` split; they are resolved already."""
    options = params_cls.options()
    values = {name: options[name].check(name, value) for name, value in fields.items()}
    for name in dict.fromkeys(name for name, _, _ in images):
        values[name] = joined([(place, image) for each, place, image in images if each == name])
    return params_cls(**values)


def image_to_array(image: Input) -> Array:
    """Return an image's pixels, [H, W, C]; or, of one that is encoded, or a clip, its file."""
    if image is None:
        return np.zeros(0, np.uint8)
    if isinstance(image, EncodedImage | EncodedClip):
        return np.frombuffer(image.file, np.uint8)
    return np.ascontiguousarray(image)


def described_image(param: str, place: Place, image: Input) -> Pictured:
    """Return what a message says of an image or a clip beside its bytes."""
    if image is None:
        return Pictured(param, place, "", 0, 0)
    if isinstance(image, EncodedClip):
        return Pictured(param, place, "", image.width, image.height, image.kind, image.num_frames)
    kind = image.kind if isinstance(image, EncodedImage) else ""
    return Pictured(param, place, image.mode, image.width, image.height, kind)


def array_to_image(data: bytes, about: Pictured) -> Input:
    """Return the image whose pixels these are; or, of a file, one that is decoded when its pixels are needed."""
    if not data:
        return None
    if about.num_frames:
        return EncodedClip(data, about.kind, (about.width, about.height), about.num_frames)
    if about.kind:
        return EncodedImage(data, about.kind, about.mode, (about.width, about.height))
    return Image.frombytes(about.mode, (about.width, about.height), data)


def schema_to_wire(schema: ModelSchema) -> WireSchema:
    """Return what of a schema another process needs."""
    shared = {name: value for name, value in vars(schema).items() if name != "params_cls"}
    shared |= {"defaults": dict(schema.defaults), "capabilities": sorted(schema.capabilities)}
    cls = schema.params_cls
    return WireSchema(params=_params_to_wire(cls) if issubclass(cls, PackageParams) else None, **shared)


def schema_from_wire(wire: WireSchema) -> ModelSchema:
    """Return the schema that the worker published."""
    params_cls = get_pipeline(wire.pipeline_name).sampling_param_cls() if wire.params is None else _made(wire.params)
    shared = {name: value for name, value in msgspec.structs.asdict(wire).items() if name != "params"}
    shared["defaults"] = _checked(params_cls, wire.defaults)
    shared["capabilities"] = frozenset(wire.capabilities)
    return ModelSchema(params_cls=params_cls, **shared)


def _params_to_wire(params_cls: type[PackageParams]) -> WireParams:
    common = SamplingParams.options()
    own = {name: known for name, known in params_cls.options().items() if common.get(name) != known}
    excluded, refused = sorted(params_cls.excluded), dict(params_cls.refused)
    return WireParams(params_cls.__name__, own, dict(params_cls.defaults), excluded, refused, params_cls.tasks)


def _made(wire: WireParams) -> type[SamplingParams]:
    made = make_params_cls(**msgspec.structs.asdict(wire))
    made.tasks = tuple(replace(task, defaults=_checked(made, task.defaults)) for task in wire.tasks)
    return made


def _checked(params_cls: type[SamplingParams], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return defaults as parameters have them: with tuples where JSON has lists."""
    options = params_cls.options()
    return {name: options[name].check(name, value) for name, value in defaults.items()}
