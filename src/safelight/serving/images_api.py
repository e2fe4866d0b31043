"""`POST /v1/images/generations` and `/v1/images/edits`: answered at once, as a stream, or as a job."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight import media
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, UsageError
from safelight.runtime.client import GenerationRequest, Output, Ticket, total_timings
from safelight.serving.context import Context, job_error, json_response, request_id
from safelight.serving.encoding import encode_image
from safelight.serving.events import EventStream, event, event_pieces
from safelight.serving.fields import Asked, Resolved, resolve, sort_fields
from safelight.serving.http.bodies import aside, read_fields
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.errors import GONE, answerable, error_body
from safelight.serving.http.large_json import JsonResponse, LargeJson, in_thread
from safelight.serving.http.spool import Spool
from safelight.serving.jobs.job import Job
from safelight.serving.jobs_api import content_url, job_object, submit
from safelight.serving.own_fields import IMAGES, takes_pictures
from safelight.serving.trial import try_pictures

_BYTES_PER_TOKEN = 4
"""Of text, roughly: only the worker has the tokenizer, and usage is no bill here."""


def check_image_fields(asked: Asked, edits: bool) -> None:
    """Check what concerns several of the API's own fields, or what the model makes.

    Raises:
        InvalidParameterError: naming the field.

    """
    if edits and not asked.pictures.keys() & {"image", IMAGES}:
        raise InvalidParameterError("image", None, "the picture to edit")
    own, alpha = asked.own, asked.schema.params_cls.makes_alpha
    output_format, background = own.get("output_format", "png"), own.get("background", "auto")
    if own.get("partial_images"):
        raise InvalidParameterError("partial_images", own["partial_images"], "0 or null: previews are not made yet")
    if output_format == "png" and own.get("output_compression", 100) != 100:
        raise InvalidParameterError(
            "output_compression", own["output_compression"], "100 or null for png, which is exact"
        )
    if background not in ("auto", made := "transparent" if alpha else "opaque"):
        raise InvalidParameterError("background", background, f"{made} or auto, which is what this model makes")
    if alpha and output_format == "jpeg":
        raise InvalidParameterError("output_format", output_format, "png or webp: this model's pictures have alpha")
    if own.get("stream") and own.get("response_format") == "url":
        raise InvalidParameterError("response_format", "url", "b64_json, where stream is true")


def routes(context: Context) -> APIRouter:
    """Return the routes of pictures."""
    router = APIRouter()

    @router.post("/v1/images/generations")
    @router.post("/v1/images/edits")
    async def create(request: Request) -> Response:
        edits = request.scope["path"].endswith("/edits")
        body = await read_fields(request, context.limits, context.held, forms=edits)
        schema = context.schema_for(request, makes_video=False)
        context.check_model(body.fields.get("model"))
        if edits and not takes_pictures(schema):
            error = "image: this model takes no input picture; use /v1/images/generations"
            raise UsageError.rebuilt(error, "image")
        asked = await aside(body, sort_fields, body, schema, context.limits)
        check_image_fields(asked, edits)
        resolved = await aside(body, resolve, asked, context.limits)
        as_job, streams = prefers_async(request), asked.own.get("stream")
        if as_job and streams:
            raise InvalidParameterError("stream", True, "false, with Prefer: respond-async")
        as_urls = asked.own.get("response_format", context.settings.response_format) == "url" and not streams
        admission = context.admission.admit(request, resolved, is_job=as_job or as_urls)
        await try_pictures(request.receive, resolved.pictures)
        if as_job or as_urls:
            echo = {"quality": resolved.quality, "background": resolved.background}
            job = await submit(request, context, body, resolved, admission, echo)
            return _accepted(request, context, job) if as_job else await _urls(request, context, resolved, job)
        context.admission.check_place(admission)
        asked_for = GenerationRequest(
            request_id(request), resolved.params, admission.priority, admission.deadline, tenant=admission.tenant
        )
        ticket = context.engine.submit(asked_for)
        context.admission.wait(admission, ticket)
        if streams:
            return _as_stream(request, context, resolved, ticket, "image_edit" if edits else "image_generation")
        return await _at_once(request, context, resolved, ticket)

    return router


def prefers_async(request: Request) -> bool:
    """Say whether a client asks for a job instead of an answer (RFC 7240)."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in [preference.partition(";")[0].strip().lower() for preference in preferences]


@dataclass(frozen=True)
class Finished:
    """What the engine made of a synchronous request, and how long it took, in seconds."""

    outputs: list[Output]
    seconds: float
    queue_seconds: float


async def _follow(ticket: Ticket) -> Finished:
    """Wait for a request's outputs."""
    began, queue_seconds = time.perf_counter(), 0.0
    async for progress in ticket.changes():
        if progress.state == "running" and not queue_seconds:
            queue_seconds = time.perf_counter() - began
    return Finished(await ticket.result(), time.perf_counter() - began, queue_seconds)


async def _at_once(request: Request, context: Context, resolved: Resolved, ticket: Ticket) -> Response:
    """Answer with the pictures, and end the request within one step if its client goes away."""
    try:
        finished = await unless_gone(request.receive, _follow(ticket))
    finally:
        context.engine.cancel(ticket.request.request_id)
    pictures = await _pictures(context, resolved, finished)
    metrics = _metrics(finished.seconds, finished.queue_seconds, total_timings(finished.outputs))
    return JsonResponse({**_response(resolved, pictures, finished), "metrics": metrics})


async def _pictures(context: Context, resolved: Resolved, finished: Finished) -> list[dict[str, Any]]:
    """Return what was made, encoded, and count it."""
    pictures = await context.jobs.outputs.run(_encode, resolved, finished, Spool(context.jobs.outputs.directory))
    task, timings = resolved.schema.task.value, total_timings(finished.outputs)
    context.metrics.completed(task, finished.seconds, finished.queue_seconds, timings, len(pictures))
    return pictures


def _encode(resolved: Resolved, finished: Finished, spool: Spool) -> list[dict[str, Any]]:
    """Return each picture's file, its seed, and its size, and let the pixels go. For a thread."""
    compression = resolved.asked.own.get("output_compression")
    pictures = []
    for output in finished.outputs:
        pipeline_name = resolved.schema.pipeline_for(output.params)
        metadata = media.file_metadata(resolved.schema.model, pipeline_name, output.params)
        for array in output.pictures():
            file = encode_image(array, resolved.output_format, compression, metadata)
            size = f"{array.shape[1]}x{array.shape[0]}"
            pictures.append({"b64_json": spool.add(file), "revised_prompt": None, "seed": output.seed, "size": size})
        output.media.clear()  # whoever reads the answer slowly keeps the ticket
    return pictures


def _response(resolved: Resolved, pictures: Sequence[Mapping[str, Any]], finished: Finished | None) -> dict[str, Any]:
    warnings = [text for output in finished.outputs for text in output.warnings] if finished else []
    return {
        "created": int(time.time()),
        "data": pictures,
        "size": pictures[0]["size"],
        "quality": resolved.quality,
        "output_format": resolved.output_format,
        "background": resolved.background,
        "usage": usage(resolved.params, resolved.schema),
        "warnings": list(dict.fromkeys([*resolved.warnings, *warnings])),
    }


def _metrics(seconds: float | None, queue_seconds: float | None, stage_seconds: Mapping[str, float]) -> dict[str, Any]:
    return {"seconds": seconds, "queue_seconds": queue_seconds, "stage_seconds": stage_seconds}


def usage(params: SamplingParams, schema: ModelSchema) -> dict[str, Any]:
    """Return what a request used: text in units of four bytes, and pictures in latent tokens."""
    texts = [text for text in (params.prompt, params.negative_prompt) if isinstance(text, str)]
    text_tokens = sum(-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts)
    multiple = schema.size_multiple
    image_tokens = sum(-(-image.width // multiple) * -(-image.height // multiple) for image in params.given_images())
    output_tokens = params.num_latent_tokens(schema) * len(params.split())
    return {
        "input_tokens": text_tokens + image_tokens,
        "output_tokens": output_tokens,
        "total_tokens": text_tokens + image_tokens + output_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": image_tokens},
    }


def _as_stream(request: Request, context: Context, resolved: Resolved, ticket: Ticket, prefix: str) -> Response:
    """Answer with events."""

    def close() -> None:
        if not ticket.done:
            context.metrics.ended(resolved.schema.task.value, GONE)
        context.engine.cancel(ticket.request.request_id)

    return EventStream(_stream(request, context, resolved, ticket, prefix), context.limits.ping_seconds, close)


async def _stream(
    request: Request, context: Context, resolved: Resolved, ticket: Ticket, prefix: str
) -> AsyncGenerator[bytes, None]:
    """Yield one completed event a picture, or an error: the answer has begun, so that it is an event too."""
    try:
        finished = await _follow(ticket)
        pictures = await _pictures(context, resolved, finished)
    except Exception as error:  # the boundary of a request whose answer has begun
        known = answerable(error, request_id(request))
        context.metrics.failed(resolved.schema.task.value, known)
        yield event("error", error_body(known))
        return
    response = _response(resolved, pictures, finished)
    shared = {name: response[name] for name in ("background", "output_format", "quality", "usage", "warnings")}
    for picture in pictures:
        kind = f"{prefix}.completed"
        data = LargeJson({"type": kind, "created_at": response["created"], **shared, **picture})
        async for piece in in_thread(event_pieces(kind, data)):
            yield piece


def _accepted(request: Request, context: Context, job: Job) -> Response:
    """Answer with the job."""
    context.count_job(job, request.scope["state"]["task"])
    headers = {"preference-applied": "respond-async", "location": f"/v1/jobs/{job.id}"}
    return json_response(job_object(job, context, request), 202, headers)


async def _urls(request: Request, context: Context, resolved: Resolved, job: Job) -> Response:
    """Answer with the addresses of the pictures, once the job has made them; it ends if its client goes away."""
    try:
        job = await unless_gone(request.receive, context.finished(job))
    finally:
        if not job.finished:
            await context.jobs.cancel(job.id)
    if job.error is not None:
        raise job_error(job)
    context.count_completed(job, resolved.schema.task.value)
    pictures = [
        {"url": content_url(context, request, job, index), "revised_prompt": None, "seed": output.seed}
        | {"size": f"{output.width}x{output.height}"}
        for index, output in enumerate(job.outputs)
    ]
    response = {**_response(resolved, pictures, None), "warnings": job.warnings}
    return json_response({**response, "metrics": _metrics(job.seconds, job.queue_seconds, job.timings)})
