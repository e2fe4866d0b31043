"""A folder of outputs, and what the stub engine makes: what tests of files share."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from safelight.preparation import prepare
from safelight.serving.directories import MARKER
from safelight.serving.jobs import outputs as module
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.job import Job
from tests.serving.stub_engine import IMAGE_SCHEMA, make_output


def an_output(schema=IMAGE_SCHEMA, prompt="a", **fields):
    return make_output(prepare(schema, {"prompt": prompt, "seed": 7, **fields})[0])


def with_outputs(folder: Path, use):
    async def main():
        outputs = FolderFiles(folder)
        try:
            return await use(outputs)
        finally:
            await outputs.close()

    return asyncio.run(main())


async def stage(outputs: FolderFiles, stem: str, made, output_format="png", schema=IMAGE_SCHEMA):
    job = Job(id=stem, kind="image", model="m", params={}, created_at=1.0, output_format=output_format)
    return await outputs.stage(functools.partial(module.write_outputs, job, made, schema))


async def publish(outputs: FolderFiles, stem: str, made, schema=IMAGE_SCHEMA, output_format="png"):
    batch, stored = await stage(outputs, stem, made, output_format, schema)
    await outputs.publish(batch)
    return stored


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARKER}
