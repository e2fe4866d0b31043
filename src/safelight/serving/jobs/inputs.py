"""What the engine is to be given: into a job and its files, and out of them again when it runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from safelight import media
from safelight.core.params import SamplingParams
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
    kind: Kind = "video" if schema.task.makes_video else "image"
    job_id = new_id(kind)
    options, values = params.options(), params.set_fields()
    plain = {name: value for name, value in values.items() if options[name].kind not in ("image", "images")}
    given = [(param, data) for param, pictures in images.items() for data in pictures]
    files = {f"{job_id}.input{index}": data for index, (_, data) in enumerate(given)}
    inputs = tuple(StoredFile(name, len(data), param) for name, (param, data) in zip(files, given, strict=True))
    stored = msgspec.json.decode(msgspec.json.encode(plain), type=dict[str, Any])  # as it will be read: without tuples
    return Job(id=job_id, kind=kind, model=schema.model, params=stored, inputs=inputs, **asked), files


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
    images: dict[str, Any] = {}
    for file in job.inputs:
        try:
            with read(file.name) as stored:
                encoded = EncodedImage.read(stored.read(), media.READ_FORMATS)
                image = media.open_image(encoded, mode=cls.mode_of(file.param))
        except FileNotFoundError as error:  # a message could hold the path
            raise SafelightError("an input image of this job is not there any more") from error
        except (InvalidParameterError, *media.UNREADABLE) as error:
            if isinstance(error, OSError) and error.errno is not None:  # and not Pillow's, of a damaged file
                raise StorageError.of(error, "an input image of this job") from error
            raise SafelightError("an input image of this job cannot be read any more") from error
        single = options[file.param].kind == "image"
        images[file.param] = image if single else (*images.get(file.param, ()), image)
    fields = cls.from_fields({**job.params, **images}).set_fields()
    # Checked for its plain types alone: JSON has lists where parameters have tuples. What is unset stays unset.
    return cls(**{name: options[name].check(name, value) for name, value in fields.items()})
