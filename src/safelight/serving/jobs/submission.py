"""A checked request on its way into a job, and out of it again when the job runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from safelight import media
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError, ModelNotFoundError, SafelightError, StorageError
from safelight.serving.admission import Admission
from safelight.serving.clocks import Moment
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.job import Job, Kind, StoredFile, new_id


@dataclass(frozen=True)
class Submission:
    """A checked request that is to become a job.

    Attributes:
        params: resolved, with a seed; its pictures are taken from `images` again when the job runs.
        images: the encoded pictures as they came, by the field that they were given for.
        request: the wire's own fields, to be echoed.
        output_format: png, jpeg, webp or mp4.
        compression: as `encode_image` takes it.
        warnings: what the user should know already.
        admission: as what it may be run.
        request_id: of the HTTP request that it came with, for the log.
        idempotency_key: as the client chose it; None if it chose none.
        digest: `request_digest`, where there is a key.

    """

    params: SamplingParams
    images: Mapping[str, Sequence[bytes | Stored]] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    output_format: str = "png"
    compression: int | None = None
    warnings: Sequence[str] = ()
    admission: Admission = field(default_factory=Admission)
    request_id: str = ""
    idempotency_key: str | None = None
    digest: str = ""


def new_job(
    submission: Submission, schema: ModelSchema, now: float, moment: Moment, lease: int | None
) -> tuple[Job, dict[str, bytes | Stored]]:
    """Return a queued job, accepted now and claimed by a lease, and its input files by name."""
    kind: Kind = "video" if schema.task.makes_video else "image"
    job_id = new_id(kind)
    options, values = submission.params.options(), submission.params.set_fields()
    plain = {name: value for name, value in values.items() if options[name].kind not in ("image", "images")}
    given = [(param, data) for param, pictures in submission.images.items() for data in pictures]
    files = {f"{job_id}.input{index}": data for index, (_, data) in enumerate(given)}
    inputs = [StoredFile(name, len(data), param) for name, (param, data) in zip(files, given, strict=True)]
    job = Job(
        id=job_id,
        kind=kind,
        model=schema.model,
        params=_as_stored(plain),
        created_at=now,
        accepted=moment,
        request=_as_stored(dict(submission.request)),
        output_format=submission.output_format,
        compression=submission.compression,
        owner=submission.admission.owner,
        priority=submission.admission.priority,
        request_id=submission.request_id,
        idempotency_key=submission.idempotency_key,
        digest=submission.digest,
        inputs=tuple(inputs),
        warnings=tuple(submission.warnings),
        lease=lease,
    )
    return job, files


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
                image = media.open_image(EncodedImage.read(stored.read(), media.READ_FORMATS), mode=cls.image_mode)
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


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they will be when they are read again: JSON knows no tuples."""
    return msgspec.json.decode(msgspec.json.encode(values), type=dict[str, Any])
