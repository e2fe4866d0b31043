"""`/v1/jobs`: how a request becomes a job; a client's jobs; and one job, its events, its files, and its end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, BinaryIO, Literal, cast

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from safelight.core.options import Option
from safelight.errors import InvalidParameterError, StorageError, UnknownParameterError
from safelight.serving.admission import Admission
from safelight.serving.context import Context, json_response, request_id, timestamp
from safelight.serving.encoding import MEDIA_TYPES
from safelight.serving.events import EventStream, event
from safelight.serving.fields import Resolved, typed
from safelight.serving.http.bodies import Body, aside
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.errors import ConflictStateError, MalformedRequestError, NotFoundError, RangeError
from safelight.serving.jobs.inputs import new_job
from safelight.serving.jobs.job import Job, Kind, StoredFile, request_digest
from safelight.serving.principals import principal_of

VARIANTS = ("video", "thumbnail", "spritesheet")
_LIST_FIELDS = ("after", "limit", "order")
_RANGE = re.compile(r"\s*bytes\s*=\s*([0-9]{0,19})-([0-9]{0,19})\s*")
_CHUNK = 1 << 18


def routes(context: Context) -> APIRouter:
    """Return the routes of jobs."""
    router = APIRouter()

    @router.get("/v1/jobs")
    async def page(request: Request) -> Response:
        return await page_response(request, context, None, lambda job: job_object(job, context, request))

    @router.get("/v1/jobs/{job_id}")
    async def retrieve(request: Request) -> Response:
        job = await context.job(request, request.path_params["job_id"])
        return json_response(job_object(job, context, request))

    @router.delete("/v1/jobs/{job_id}")
    async def cancel(request: Request) -> Response:
        job = await context.job(request, request.path_params["job_id"])
        ended = await context.jobs.cancel(job.id)
        return json_response(job_object(ended or job, context, request))

    @router.get("/v1/jobs/{job_id}/events")
    async def events(request: Request) -> Response:
        job = await context.job(request, request.path_params["job_id"])
        return EventStream(_events(context, request, job), context.limits.ping_seconds)

    @router.get("/v1/jobs/{job_id}/content")
    async def content(request: Request) -> Response:
        job = await context.job(request, request.path_params["job_id"])
        among = Option("integer", "which output", minimum=0, maximum=max(1, len(job.outputs)) - 1)
        index = among.check("index", typed("integer", request.query_params.get("index", "0")))
        return await content_response(request, context, job, index)

    return router


async def submit(
    request: Request, context: Context, body: Body, resolved: Resolved, admission: Admission, echo: Mapping[str, Any]
) -> Job:
    """Make a job of a request, with its `Idempotency-Key`; `echo` are the fields that are to be shown of it again.

    Raises:
        MalformedRequestError: for a key that is empty or too long.
        ServingError: if it cannot be taken now.

    """
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= context.limits.key_length:
        raise MalformedRequestError(f"idempotency-key: it takes 1 to {context.limits.key_length} characters")
    as_it_came = {"path": request.scope["path"], "fields": body.fields}
    job, files = new_job(
        resolved.params,
        resolved.schema,
        resolved.images,
        request=echo,
        output_format=resolved.output_format,
        compression=resolved.asked.own.get("output_compression"),
        warnings=tuple(resolved.warnings),
        owner=admission.owner,
        priority=admission.priority,
        request_id=request_id(request),
        idempotency_key=key,
        digest="" if key is None else await aside(body, request_digest, as_it_came, body.files),
    )
    return await context.jobs.acceptance.submit(job, files, admission)


async def page_response(
    request: Request, context: Context, kind: Kind | None, described: Callable[[Job], dict[str, Any]]
) -> Response:
    """Return a page of the jobs of whoever asks, newest first unless asked otherwise.

    Raises:
        UsageError: for a query that it does not take.

    """
    query = request.query_params
    for name in query:
        if name not in _LIST_FIELDS:
            raise UnknownParameterError(name, _LIST_FIELDS)
    counted = Option("integer", "jobs in a page", minimum=1, maximum=context.limits.page)
    limit = counted.check("limit", typed("integer", query.get("limit", "20")))
    order = cast(Literal["asc", "desc"], query.get("order", "desc"))  # the store refuses any other
    found = await context.jobs.store.page(kind, principal_of(request).owner, query.get("after"), limit, order)
    data = [described(job) for job in found.jobs]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return json_response({"object": "list", "data": data, **ends, "has_more": found.has_more})


def job_object(job: Job, context: Context, request: Request) -> dict[str, Any]:
    """Return a job as its clients see it."""
    progress = context.progress(job)
    running = job.state == "in_progress"
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "model": context.model_name,
        "state": job.state,
        "priority": job.priority,
        "created_at": timestamp(job.created_at),
        "started_at": timestamp(job.started_at),
        "completed_at": timestamp(job.completed_at),
        "expires_at": timestamp(job.expires_at),
        "queue_position": progress.queue_position if job.state == "queued" else None,
        "stage": progress.stage if running else None,
        "step": progress.step if running else None,
        "num_inference_steps": progress.num_inference_steps if running else None,
        "seconds_left": progress.seconds_left if running else None,
        "progress": percent(job, context),
        "seed": job.params.get("seed"),
        "params": {name: value for name, value in job.params.items() if name != "output_type"},
        "outputs": [
            {
                "url": content_url(context, request, job, index),
                "media_type": output.media_type,
                "size": f"{output.width}x{output.height}",
                "bytes": output.num_bytes,
                "seed": output.seed,
            }
            for index, output in enumerate(job.outputs)
        ],
        "warnings": job.warnings,
        "stage_seconds": job.timings,
        "error": job.error,
    }


def percent(job: Job, context: Context) -> int:
    """Return whole percents: 100 for who has the outputs."""
    return 100 if job.state == "completed" else context.progress(job).percent


def content_url(context: Context, request: Request, job: Job, index: int) -> str:
    """Return the absolute address of an output, which opens without the key for as long as the job is kept."""
    end = context.jobs.expiry.end(job)
    signed = context.addresses.signed(f"/v1/jobs/{job.id}/content", {"index": str(index)}, end)
    return f"{context.base_url(request)}{signed}"


async def _events(context: Context, request: Request, job: Job) -> AsyncGenerator[bytes, None]:
    async for happened in context.jobs.events.follow(job.id):
        async with context.event_turn:
            await asyncio.sleep(0)  # what else there is goes before; a turn that nobody waits in is none
            data = event(happened.type, {"type": happened.type, "job": job_object(happened.job, context, request)})
        yield data


async def content_response(request: Request, context: Context, job: Job, index: int = 0) -> Response:
    """Return a file of a completed job, or the part of it that was asked for.

    Raises:
        InvalidParameterError: for an unknown variant, or too many ranges.
        ConflictStateError: if it has not completed.
        NotFoundError: if it was removed.
        RangeError: for a range beyond the file.

    """
    variant = request.query_params.get("variant", "video")
    if variant not in VARIANTS or (job.kind == "image" and "variant" in request.query_params):
        raise InvalidParameterError("variant", variant, f"one of {', '.join(VARIANTS)}, of a video")
    if not job.outputs:
        raise ConflictStateError(f"the job is {job.state.replace('_', ' ')}: it has no content")
    output = job.outputs[index]
    stored = {"video": StoredFile(output.name, output.num_bytes), **output.extras}[variant]
    name, size = stored.name, stored.num_bytes
    etag = f'"{name}"'
    headers = {"accept-ranges": "bytes", "etag": etag, "cache-control": "private"}
    asked = request.headers.get("range", "") if request.headers.get("if-range", etag) == etag else ""
    part = _part(asked, size, context.limits.ranges)
    first, last = part or (0, size - 1)
    headers["content-length"] = str(last - first + 1)
    if part is not None:
        headers["content-range"] = f"bytes {first}-{last}/{size}"
    try:
        file = await asyncio.to_thread(context.jobs.outputs.open, name)
    except FileNotFoundError as error:
        raise NotFoundError("the job has been removed") from error
    except OSError as error:
        raise StorageError.of(error, "the file") from error
    status, media_type = 200 if part is None else 206, MEDIA_TYPES[name.rpartition(".")[2]]
    return _FilePart(file, first, last - first + 1, status, headers, media_type)


def _part(header: str, size: int, most: int) -> tuple[int, int] | None:
    """Return the first and last byte asked for; None for the whole: what is no range, or several (RFC 9110, 14.2)."""
    if header.count(",") >= most:
        raise InvalidParameterError("range", f"{header.count(',') + 1} ranges", f"at most {most}")
    asked = _RANGE.fullmatch(header)
    if asked is None or not any(asked.groups()):
        return None
    first, last = asked.groups()
    if first and last and int(last) < int(first):
        return None
    begin, end = (int(first), int(last or size)) if first else (max(0, size - int(last)), size)
    end = min(end, size - 1)
    if begin > end:
        raise RangeError(size)
    return begin, end


class _FilePart(Response):
    """A part of an open file, which is closed whatever becomes of the client."""

    def __init__(
        self, file: BinaryIO, start: int, count: int, status: int, headers: dict[str, str], media_type: str
    ) -> None:
        self._file, self._start, self._count = file, start, count
        super().__init__(None, status, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the part, unless the client goes away."""
        try:
            await unless_gone(receive, self._send(send))
        except ClientDisconnect:
            pass
        finally:
            self._file.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await asyncio.to_thread(self._file.seek, self._start)
        left = self._count
        while left > 0 and (chunk := await asyncio.to_thread(self._file.read, min(_CHUNK, left))):
            left -= len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})
