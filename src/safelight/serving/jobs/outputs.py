"""What the engine made, as the files of a job. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from safelight import media, video
from safelight.core.schema import ModelSchema
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
    output_format = job.output_format
    stored: list[StoredOutput] = []
    for output in outputs:
        metadata = media.file_metadata(schema.model, schema.pipeline_name, output.params)
        if output_format == "mp4":
            for frames in output.media:
                name = f"{stem}.{len(stored)}.{output_format}"
                with _ONE_VIDEO:
                    stored.append(_write_video(batch, name, frames, output, metadata))
            continue
        for array in output.pictures():
            name = f"{stem}.{len(stored)}.{output_format}"
            size = batch.write(name, encode_image(array, output_format, job.compression, metadata))
            height, width = array.shape[:2]
            stored.append(StoredOutput(name, MEDIA_TYPES[output_format], width, height, size, output.seed))
    return stored


def _write_video(batch: Batch, name: str, frames: Media, output: Output, metadata: Mapping[str, Any]) -> StoredOutput:
    fps = output.params["fps"]
    size = batch.make(name, lambda path: video.save_video(frames, path, fps, metadata))
    extras = {"thumbnail": (thumbnail(frames), "webp"), "spritesheet": (spritesheet(frames), "jpeg")}
    files = {}
    for variant, (data, ending) in extras.items():
        file = StoredFile(f"{name}.{variant}.{ending}", len(data))
        batch.write(file.name, data)
        files[variant] = file
    height, width = frames.shape[1:3]
    return StoredOutput(name, MEDIA_TYPES["mp4"], width, height, size, output.seed, len(frames), fps, files)
