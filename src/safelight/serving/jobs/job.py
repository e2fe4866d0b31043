"""A durable job, of images or of videos: what it is, and what it may become. Imports no torch.

    queued -> in_progress -> completed
      |           |  `- in_progress (its second attempt)
      `-----------`---> failed

A job is changed in one way only: `JobStore.replace` puts its next form in the place of the form that was read, in one
transaction, if the store still holds that one and the step is one of the above. Whoever comes second is refused, so
that a job is finished once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from safelight.core.form import Form, Mode
from safelight.core.placed import Place
from safelight.errors import ConflictError
from safelight.serving.clocks import Moment
from safelight.serving.http.spool import LongText, Stored, parts

Kind = Literal["image", "video"]
JobState = Literal["queued", "in_progress", "completed", "failed"]

MAX_ATTEMPTS = 2
_ENDS: Mapping[JobState, tuple[JobState, ...]] = {"queued": ("failed",), "in_progress": ("completed", "failed")}


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed, as an answer of the server names it."""

    code: str
    message: str
    param: str | None = None


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a job, in the outputs directory.

    Attributes:
        name: of the file, without a folder.
        num_bytes: its size.
        param: of an input: the field that it was given for.
        place: of an input: in the field's lists; None is one after another, in a list.

    """

    name: str
    num_bytes: int
    param: str = ""
    place: Place | None = None


class StoredOutput(msgspec.Struct, frozen=True):
    """One finished picture, video or sound.

    Attributes:
        name: of its file, without a folder.
        media_type: of its bytes, as HTTP names it.
        width, height: in pixels; 0 of a sound.
        num_bytes: of the file.
        seed: of its noise.
        num_frames, fps: of a video; frames, and frames a second.
        extras: files made of it, by variant: a video's `thumbnail` and `spritesheet`.

    """

    name: str
    media_type: str
    width: int
    height: int
    num_bytes: int
    seed: int
    num_frames: int | None = None
    fps: int | None = None
    extras: dict[str, StoredFile] = {}

    @property
    def files(self) -> list[StoredFile]:
        """Its own, and those that were made of it."""
        return [StoredFile(self.name, self.num_bytes), *self.extras.values()]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One durable job. Times are seconds since 1970, for people; what lies between two of them is told by moments.

    Attributes:
        id: safe in a URL; begins with `image_` or `video_`.
        kind: what it makes.
        model: the name that the model was loaded by.
        params: resolved, the seed among them, as JSON can hold them; input images are in `inputs`.
        created_at: when it was accepted; 0 before.
        request: the request's own fields, as they must be echoed: size, seconds, quality, ...
        output_format: png, jpeg, webp, mp4 or wav.
        compression: 0 to 100, of jpeg and webp; None is the format's default.
        owner: `owner_of` the API key; empty where there are no keys.
        priority: higher goes first.
        request_id: of the HTTP request that it came with, for the log.
        idempotency_key: as the client chose it.
        digest: of the request, to be compared when the key comes again.
        state: one of four.
        attempts: how often its run has been recorded as begun; at most `MAX_ATTEMPTS`.
        started_at: when its first attempt began.
        form: in which its model calls are made: chosen when its first attempt began, and kept by the second.
        completed_at: when it completed or failed.
        expires_at: when it may be removed; None before it has finished.
        inputs: stored input files, in their order.
        outputs: what it made, one prompt and seed after the other.
        warnings: what the user should know.
        timings: seconds of each stage, over all outputs.
        error: why it failed.
        accepted, began, ended: when it was accepted, begun first, and finished, on the clock that nobody sets.
        lease: of the server that is to run it, as the store numbers leases; None where nobody has claimed it, and once
            it has finished.

    """

    id: str
    kind: Kind
    model: str
    params: dict[str, Any]
    created_at: float = 0.0
    request: dict[str, Any] = {}
    output_format: str = "png"
    compression: int | None = None
    owner: str = ""
    priority: int = 0
    request_id: str = ""
    idempotency_key: str | None = None
    digest: str = ""
    state: JobState = "queued"
    attempts: int = 0
    started_at: float | None = None
    form: Form | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    inputs: tuple[StoredFile, ...] = ()
    outputs: tuple[StoredOutput, ...] = ()
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = {}
    error: JobError | None = None
    accepted: Moment | None = None
    began: Moment | None = None
    ended: Moment | None = None
    lease: int | None = None

    @property
    def seconds(self) -> float | None:
        """From its acceptance to its end; None where that is not known, as where the machine was started between."""
        return None if self.ended is None else self.ended.since(self.accepted)

    @property
    def queue_seconds(self) -> float | None:
        """From its acceptance to its first attempt."""
        return None if self.began is None else self.began.since(self.accepted)

    @property
    def expires(self) -> Moment | None:
        """When it may be removed, on the clock that it ended by."""
        if self.ended is None or self.expires_at is None or self.completed_at is None:
            return None
        kept = self.expires_at - self.completed_at
        return Moment(self.ended.clock, self.ended.seconds + kept)

    @property
    def finished(self) -> bool:
        """Whether it completed or failed."""
        return self.state in ("completed", "failed")

    @property
    def files(self) -> list[StoredFile]:
        """Every file that is its own."""
        return [*self.inputs, *(file for output in self.outputs for file in output.files)]

    @property
    def num_bytes(self) -> int:
        """The size of its files, and of its record."""
        return sum(file.num_bytes for file in self.files) + len(self.record)

    @property
    def record(self) -> bytes:
        """All of it as JSON, but for the lease: that is the store's, which ends it."""
        return msgspec.json.encode(msgspec.structs.replace(self, lease=None))

    def begun(self, at: float, form: Form | None = None, moment: Moment | None = None) -> Job:
        """Return it as it is once its next attempt has begun; the engine may have died before it told the form."""
        next_form = msgspec.structs.replace(
            self, state="in_progress", attempts=self.attempts + 1, form=self.form or form
        )
        return next_form if self.attempts else msgspec.structs.replace(next_form, started_at=at, began=moment)

    def completed(self, outputs: Sequence[StoredOutput], warnings: Sequence[str], timings: Mapping[str, float]) -> Job:
        """Return it as it is with its outputs; `warnings` are added to its own. When that is, `Expiry.ended` says."""
        every = tuple(dict.fromkeys([*self.warnings, *warnings]))
        made = {"outputs": tuple(outputs), "warnings": every, "timings": dict(timings)}
        return msgspec.structs.replace(self, state="completed", lease=None, **made)

    def failed(self, error: JobError) -> Job:
        """Return it as it is once it has failed. When that is, `Expiry.ended` says."""
        return msgspec.structs.replace(self, state="failed", lease=None, error=error)

    def may_become(self, other: Job) -> bool:
        """Say whether `other` is a legal next form of this job."""
        if other.state == "in_progress":
            return not self.finished and other.attempts == self.attempts + 1 <= MAX_ATTEMPTS
        return other.attempts == self.attempts and other.state in _ENDS.get(self.state, ())


class _Earlier(msgspec.Struct):
    """What a record of an earlier version says in another way."""

    mode: Mode | None = None


def read_job(record: bytes) -> Job:
    """Return the job of a record, which an earlier version may have written."""
    job = msgspec.json.decode(record, type=Job)
    if job.form is None and (mode := msgspec.json.decode(record, type=_Earlier).mode) is not None:
        return msgspec.structs.replace(job, form=Form(mode))
    return job


def new_id(kind: str) -> str:
    """Return a name that nobody can guess: the kind, and 128 random bits."""
    return f"{kind}_{secrets.token_hex(16)}"


def request_digest(fields: Mapping[str, Any], files: Sequence[bytes | Stored] = ()) -> str:
    """Return a hash of a request as it came: its fields, in any order, and its files, in their order.

    Of a large body: run it in a thread.
    """
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=_digested).encode())
    for data in files:
        digest.update(file_digest(data))
    return digest.hexdigest()


def _digested(value: Any) -> dict[str, str] | None:
    """Return what a long text stands for in JSON; other files are told apart by their own digests."""
    return {"sha256": file_digest(value).hex()} if isinstance(value, LongText) else None


def file_digest(data: bytes | Stored) -> bytes:
    """Return a hash of bytes, wherever they are."""
    digest = hashlib.sha256()
    for piece in parts(data):
        digest.update(piece)
    return digest.digest()


def check_same(existing: Job, digest: str) -> Job:
    """Return the job that an idempotency key stands for, if the request is the same.

    Raises:
        ConflictError: if the key came with another request.

    """
    if existing.digest != digest:
        raise ConflictError("this Idempotency-Key was used for another request; choose a new one")
    return existing
