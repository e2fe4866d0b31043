"""`/v1/videos`: durable jobs in the form that OpenAI's SDK knows."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from safelight.core.placed import Place
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, UsageError
from safelight.serving.context import Context, json_response, timestamp
from safelight.serving.fields import Asked, Resolved, resolve, sort_fields, typed
from safelight.serving.http.bodies import Body, aside, read_fields
from safelight.serving.http.errors import ConflictStateError, ModelNameError
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.job import Job
from safelight.serving.jobs_api import content_response, page_response, percent, submit
from safelight.serving.limits import Limits
from safelight.serving.own_fields import INPUT_REFERENCE, takes_pictures
from safelight.serving.trial import try_pictures

POLL_AFTER_MS = 1000
"""What clients that poll a video are told to wait."""


def routes(context: Context) -> APIRouter:
    """Return the routes of videos."""
    router = APIRouter()

    @router.post("/v1/videos")
    @router.post("/v1/videos/{video_id}/remix")
    async def create(request: Request) -> Response:
        """Begin a video: of what is asked alone, or of another one's parameters beneath."""
        source_id = request.path_params.get("video_id")
        body = await read_fields(request, context.limits, context.held, forms=True)
        schema = context.schema_for(request, makes_video=True)
        source = None if source_id is None else await context.job(request, source_id, "video")
        if source is None:
            context.check_model(body.fields.get("model"))
        asked = await aside(body, sort_video_fields, body, schema, context.limits)
        if source is not None:
            asked = await _remixed(source, asked, context)
            body = dataclasses.replace(body, is_long=True)  # with its source's pictures
        resolved = await aside(body, resolve, asked, context.limits)
        admission = context.admission.admit(request, resolved, is_job=True)
        await try_pictures(request.receive, resolved.pictures)
        echo = {**_echo(resolved), "remixed_from_video_id": source_id}
        job = await submit(request, context, body, resolved, admission, echo)
        context.count_job(job, resolved.schema.task.value)
        return _answer(job, context)

    @router.get("/v1/videos")
    async def page(request: Request) -> Response:
        return await page_response(request, context, "video", lambda job: video_object(job, context))

    @router.get("/v1/videos/{video_id}")
    async def retrieve(request: Request) -> Response:
        job = await context.job(request, request.path_params["video_id"], "video")
        return _answer(job, context)

    @router.delete("/v1/videos/{video_id}")
    async def delete(request: Request) -> Response:
        job = await context.job(request, request.path_params["video_id"], "video")
        deleted = await context.jobs.delete(job.id)
        return json_response({"id": job.id, "deleted": deleted, "object": "video.deleted"})

    @router.get("/v1/videos/{video_id}/content")
    async def content(request: Request) -> Response:
        job = await context.job(request, request.path_params["video_id"], "video")
        return await content_response(request, context, job)

    return router


def sort_video_fields(body: Body, schema: ModelSchema, limits: Limits) -> Asked:
    """Check each field by itself, and turn `seconds` into frames.

    Raises:
        UsageError: naming the field.

    """
    seconds = body.fields.get("seconds")
    if isinstance(seconds, str):  # as the SDK has it, in JSON too
        body = dataclasses.replace(body, fields={**body.fields, "seconds": typed("number", seconds)})
    asked = sort_fields(body, schema, limits)
    if INPUT_REFERENCE in asked.pictures and not takes_pictures(schema):
        raise UsageError.rebuilt(f"{INPUT_REFERENCE}: this model takes no picture to begin with", INPUT_REFERENCE)
    if "seconds" in asked.own:
        if "num_frames" in asked.model:
            raise InvalidParameterError("seconds", seconds, "null, where num_frames is given")
        asked.model["num_frames"] = _num_frames(asked, schema)
    return asked


def _num_frames(asked: Asked, schema: ModelSchema) -> int:
    """Return the frames that the model can make whose length is nearest."""
    fps = asked.model.get("fps", schema.defaults_for(asked.model).get("fps"))
    seconds, option = asked.own["seconds"], schema.params_cls.options().get("num_frames")
    if not fps or option is None:
        raise InvalidParameterError("seconds", seconds, "null: this model's videos have one length")
    frames = round(seconds * fps / schema.frame_step) * schema.frame_step + 1
    if option.maximum is not None and frames > option.maximum:
        raise InvalidParameterError("seconds", seconds, f"at most {option.maximum / fps:g} at {fps} frames a second")
    return int(frames)


async def _remixed(source: Job, asked: Asked, context: Context) -> Asked:
    """Return a completed video's own parameters and pictures, under what is asked of its remix.

    Raises:
        ConflictStateError: if it has not completed.
        ModelNameError: if another model made it.

    """
    if source.state != "completed":
        raise ConflictStateError(f"the video is {source.state.replace('_', ' ')}: there is nothing to remix")
    served = context.engine.schema
    if served is None or source.model != served.model:
        raise ModelNameError("model: the one that made this video is not served any more")
    replaced = {"output_type"} | ({"height", "width"} if "size" in asked.own else set())
    model = {name: value for name, value in source.params.items() if name not in replaced}
    pictures: dict[str, list[bytes | Stored]] = {}
    places: dict[str, list[Place]] = {}
    for file in source.inputs:
        if file.param not in asked.pictures and not (file.param == "image" and INPUT_REFERENCE in asked.pictures):
            data = await context.jobs.outputs.read(file.name)
            before = pictures.setdefault(file.param, [])
            places.setdefault(file.param, []).append((len(before),) if file.place is None else file.place)
            before.append(data)
    return dataclasses.replace(
        asked,
        model={**model, **asked.model},
        pictures={**pictures, **asked.pictures},
        places={**places, **asked.places},
    )


def _echo(resolved: Resolved) -> dict[str, Any]:
    """Return size and length as they are made."""
    params = resolved.params
    height, width = params.output_size(resolved.schema.size_multiple)
    seconds = (params.num_frames or 1) / params.frames_a_second()
    return {"size": f"{width}x{height}", "seconds": f"{seconds:.6g}"}


def video_object(job: Job, context: Context) -> dict[str, Any]:
    """Return a job as the SDK's `Video`, with what made it."""
    return {
        "id": job.id,
        "object": "video",
        "model": context.model_name,
        "status": job.state,
        "progress": percent(job, context),
        "created_at": timestamp(job.created_at),
        "completed_at": timestamp(job.completed_at) if job.state == "completed" else None,
        "expires_at": timestamp(job.expires_at),
        "prompt": job.params.get("prompt"),
        "size": job.request.get("size", ""),
        "seconds": job.request.get("seconds", ""),
        "remixed_from_video_id": job.request.get("remixed_from_video_id"),
        "seed": job.params.get("seed"),
        "num_frames": job.params.get("num_frames"),
        "fps": job.params.get("fps"),
        "warnings": job.warnings,
        "error": job.error,
    }


def _answer(job: Job, context: Context) -> Response:
    headers = {} if job.finished else {"openai-poll-after-ms": str(POLL_AFTER_MS)}
    return json_response(video_object(job, context), headers=headers)
