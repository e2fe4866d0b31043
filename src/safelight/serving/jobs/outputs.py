"""What the engine made, as the files of a job. Imports no torch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from safelight import media, video
from safelight.core.params import DEFAULT_FPS
from safelight.core.schema import ModelSchema
from safelight.core.sound import Sound
from safelight.runtime.client import Media, Output
from safelight.serving.encoding import MEDIA_TYPES, encode_image, spritesheet, thumbnail
from safelight.serving.jobs.files import Batch
from safelight.serving.jobs.job import Job, StoredFile, StoredOutput

_ONE_VIDEO = threading.Lock()
"""An encoder of videos holds tens of megabytes, and uses every core by itself."""


def write_outputs(job: Job, outputs: Sequence[Output], schema: ModelSchema, batch: Batch) -> list[StoredOutput]:
    """Encode what a job's attempt made, with how it was made inside, and write it into a batch. This is for a thread.

    Raises:
        OSError, SafelightError: if it cannot be encoded or written.

    """
    stem = job.id if job.attempts <= 1 else f"{job.id}.attempt{job.attempts}"  # no two attempts' files have one name
    made: list[StoredOutput] = []
    picture_format = job.output_format if job.output_format in media.BEST_OPTIONS else "png"  # of a video's model too
    for output in outputs:
        metadata = media.file_metadata(schema.model, schema.pipeline_for(output.params), output.params)
        for array in output.pictures():
            name = f"{stem}.{len(made)}.{picture_format}"
            size = batch.write(name, encode_image(array, picture_format, job.compression, metadata))
            height, width = array.shape[:2]
            made.append(StoredOutput(name, MEDIA_TYPES[picture_format], width, height, size, output.seed))
        for frames, sound in output.videos():
            with _ONE_VIDEO:
                made.append(_write_video(batch, f"{stem}.{len(made)}.mp4", frames, output, metadata, sound))
        for sound in output.alone():
            name = f"{stem}.{len(made)}.wav"
            size = batch.make(name, functools.partial(video.save_sound, sound, metadata=metadata))
            made.append(StoredOutput(name, MEDIA_TYPES["wav"], 0, 0, size, output.seed))
    return made


def _write_video(
    batch: Batch, name: str, frames: Media, output: Output, metadata: Mapping[str, Any], sound: Sound | None
) -> StoredOutput:
    fps = output.params.get("fps") or DEFAULT_FPS
    size = batch.make(name, lambda path: video.save_video(frames, path, fps, metadata, sound=sound))
    extras = {}
    for variant, made, ending in (("thumbnail", thumbnail, "webp"), ("spritesheet", spritesheet, "jpeg")):
        file = f"{name}.{variant}.{ending}"
        extras[variant] = StoredFile(file, batch.write(file, made(frames)))
    height, width = frames.shape[1:3]
    return StoredOutput(name, MEDIA_TYPES["mp4"], width, height, size, output.seed, len(frames), fps, extras)
