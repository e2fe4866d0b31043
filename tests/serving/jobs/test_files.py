"""What every `Files` promises, held by the folder and by files in memory; and a job carried through with each."""

from __future__ import annotations

import asyncio
import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from safelight.errors import StorageError
from safelight.serving.jobs.files import Files
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.job import StoredOutput, new_id
from safelight.serving.jobs.manager import JobManager
from safelight.serving.jobs.sqlite import SqliteJobStore
from safelight.serving.jobs.store import Kept
from tests.serving.job_server import SECONDS, picture, submission
from tests.serving.jobs.memory_files import MemoryFiles
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, StubEngine, make_media

A, B = new_id("image"), new_id("image")
both = pytest.mark.parametrize("make", [FolderFiles, MemoryFiles])


def with_files(make, folder, use):
    async def main():
        files = make(folder)
        try:
            await use(files)
        finally:
            await files.close()

    asyncio.run(main())


async def there(files: Files, *names: str) -> list[bool]:
    """Say of each name whether there is a file."""
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError), files.open(name):
            found.append(True)
            continue
        found.append(False)
    return found


def writing(*names: str, fails: bool = False):
    def write(batch):
        stored = [StoredOutput(name, "image/png", 1, 1, batch.write(name, name.encode()), 1) for name in names]
        size = batch.make(f"{A}.9.mp4", lambda path: path.write_bytes(b"video"))
        if fails:
            raise ValueError("it cannot be encoded")
        return [*stored, StoredOutput(f"{A}.9.mp4", "video/mp4", 1, 1, size, 1)]

    return write


@both
def test_what_is_saved_is_read(make, tmp_path):
    async def use(files):
        await files.save({f"{A}.input0": b"one", f"{A}.input1": b"two"})
        assert await files.read(f"{A}.input0") == b"one"
        with files.open(f"{A}.input1") as file:
            file.seek(1)
            assert file.read(1) == b"w"
        with pytest.raises(StorageError):
            await files.read(f"{B}.input0")
        with pytest.raises(FileNotFoundError):
            files.open(f"{B}.input0")
        files.check_writable()

    with_files(make, tmp_path, use)


@both
def test_files_appear_together_when_they_are_published(make, tmp_path):
    async def use(files):
        names = (f"{A}.0.png", f"{A}.1.png", f"{A}.9.mp4")
        batch, stored = await files.stage(writing(*names[:2]))
        assert await there(files, *names) == [False] * 3
        assert [output.name for output in stored] == list(names)
        assert [output.num_bytes for output in stored] == [*map(len, names[:2]), 5]
        await files.publish(batch)
        assert await there(files, *names) == [True] * 3
        assert await files.read(names[2]) == b"video"

    with_files(make, tmp_path, use)


@both
def test_what_is_discarded_or_fails_leaves_nothing(make, tmp_path):
    async def use(files):
        await files.save({f"{A}.input0": b"before"})
        batch, _ = await files.stage(writing(f"{A}.0.png"))
        await files.discard(batch)
        with pytest.raises(ValueError, match="encoded"):
            await files.stage(writing(f"{A}.0.png", fails=True))
        assert await there(files, f"{A}.input0", f"{A}.0.png", f"{A}.9.mp4") == [True, False, False]

    with_files(make, tmp_path, use)


@both
def test_files_are_removed_by_name_and_by_job(make, tmp_path):
    async def use(files):
        names = [f"{A}.0.png", f"{A}.attempt2.0.png", f"{A}.input0", f"{B}.0.png"]
        await files.save(dict.fromkeys(names, b"x"))
        await files.remove([f"{A}.input0", f"{A}.input7"])
        assert await there(files, *names) == [True, True, False, True]
        await files.remove_others(A, [f"{A}.attempt2.0.png"])
        assert await there(files, *names) == [False, True, False, True]

    with_files(make, tmp_path, use)


@both
def test_a_start_removes_what_jobs_do_not_have_that_are_over(make, tmp_path):
    async def use(files):
        names = [f"{A}.0.png", f"{A}.attempt2.0.png", f"{B}.0.png"]
        await files.save(dict.fromkeys(names, b"x"))

        async def kept(job_ids):
            assert set(job_ids) <= {A, B}
            return {A: Kept(is_over=True, names=frozenset({names[1]})), B: Kept(is_over=False)}

        await files.clean(kept)
        assert await there(files, *names) == [False, True, True]

    with_files(make, tmp_path, use)


@both
@pytest.mark.parametrize("schema", [EDIT_SCHEMA, IMAGE_TO_VIDEO_SCHEMA])
def test_a_job_is_carried_through(make, schema, tmp_path):
    """Its input, its outputs and what is made of them; a death between two attempts; and its end."""

    async def main():
        engine = StubEngine(schema)
        store, files = SqliteJobStore(tmp_path), make(tmp_path / "outputs")
        manager = JobManager(store, files, engine)
        await manager.start()
        try:
            async with asyncio.timeout(SECONDS):
                job = await manager.acceptance.submit(*submission(engine, "a [die:1]", images={"image": [picture()]}))
                assert await files.read(job.inputs[0].name) == picture()
                async for event in manager.events.follow(job.id):
                    job = event.job
                assert (job.state, job.attempts) == ("completed", 2)
                data = await files.read(job.outputs[0].name)
                assert len(data) == job.outputs[0].num_bytes
                if schema is EDIT_SCHEMA:
                    with Image.open(io.BytesIO(data)) as image:
                        assert np.array_equal(np.asarray(image), make_media(engine.submitted[-1].params))
                names = [file.name for file in job.files]
                assert len(names) == (2 if schema is EDIT_SCHEMA else 4)
                assert await manager.delete(job.id)
                assert await there(files, *names) == [False] * len(names)
        finally:
            await manager.close(0.0)
            await engine.aclose()

    asyncio.run(main())
