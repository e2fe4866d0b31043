"""What the engine is to be given: into a job and its files, and out of them again when it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
from PIL import Image

from safelight import media
from safelight.clips import EncodedClip, clip_kind
from safelight.core.options import MEDIA_KINDS, NULL, Option
from safelight.core.params import SamplingParams
from safelight.core.placed import Place, joined, placed
from safelight.core.schema import ModelSchema
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError, ModelNotFoundError, SafelightError, StorageError
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.job import Job, Kind, StoredFile, new_id


def new_job(
    params: SamplingParams, schema: ModelSchema, images: Mapping[str, Sequence[bytes | Stored]], **asked: Any
) -> tuple[Job, dict[str, bytes | Stored]]:
    """Return a job that is not accepted yet, and its input files by name.

    Args:
        params: resolved, with a seed; its pictures are taken from `images` again when the job runs.
        schema: of the model that is to run it.
        images: the encoded pictures as they came, by the field that they were given for.
        **asked: further fields of the job.

    """
    kind: Kind = "video" if schema.task.lasts else "image"
    job_id = new_id(kind)
    options, values = params.options(), params.set_fields()
    plain = {name: None if value is NULL else value for name, value in values.items() if not _is_file(options[name])}
    given = [
        (param, place, data)
        for param, pictures in images.items()
        for (place, _), data in zip(placed(values[param]), pictures, strict=True)
    ]
    files = {f"{job_id}.input{index}": data for index, (_, _, data) in enumerate(given)}
    inputs = tuple(
        StoredFile(name, len(data), param, place) for name, (param, place, data) in zip(files, given, strict=True)
    )
    stored = msgspec.json.decode(msgspec.json.encode(plain), type=dict[str, Any])  # as it will be read: without tuples
    return Job(id=job_id, kind=kind, model=schema.model, params=stored, inputs=inputs, **asked), files


def _is_file(option: Option) -> bool:
    return option.kind in MEDIA_KINDS


def _opened(data: bytes, option: Option, mode: str) -> Image.Image | EncodedClip | None:
    """Open a stored input again, which was judged when it came; None stands for nothing in a list."""
    if not data:
        return None
    if option.kind == "clip" and clip_kind(data) is not None:
        return EncodedClip.read(data, "clip")
    return media.open_image(EncodedImage.read(data, media.READ_FORMATS), mode=mode)


def read_params(job: Job, schema: ModelSchema, read: Callable[[str], BinaryIO]) -> SamplingParams:
    """Return a job's resolved parameters, its pictures read by `read`, and not decoded. This is for a thread.

    Raises:
        ModelNotFoundError: if the job was for another model than the one of the schema.
        StorageError: if the disk does not give a picture.
        SafelightError: if a picture cannot be read any more.

    """
    if schema.model != job.model:
        raise ModelNotFoundError("the model that this job was sent to is not served any more")
    cls = schema.params_cls
    options = cls.options()
    images: dict[str, list[tuple[Place, Any]]] = {}
    for file in job.inputs:
        try:
            with read(file.name) as stored:
                image = _opened(stored.read(), options[file.param], cls.mode_of(file.param))
        except FileNotFoundError as error:  # a message could hold the path
            raise SafelightError("an input image of this job is not there any more") from error
        except (InvalidParameterError, *media.UNREADABLE) as error:
            if isinstance(error, OSError) and error.errno is not None:  # and not Pillow's, of a damaged file
                raise StorageError.of(error, "an input image of this job") from error
            raise SafelightError("an input image of this job cannot be read any more") from error
        before = images.setdefault(file.param, [])
        one_after_another = () if options[file.param].kind == "image" else (len(before),)
        before.append((one_after_another if file.place is None else file.place, image))
    fields = cls.from_fields({**job.params, **{name: joined(each) for name, each in images.items()}}).set_fields()
    # Checked for its plain types alone: JSON has lists where parameters have tuples. What is unset stays unset.
    return cls(**{name: options[name].check(name, value) for name, value in fields.items()})
