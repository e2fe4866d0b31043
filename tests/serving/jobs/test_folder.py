"""A folder of files: whole ones or none, durable before they have a name, and what a full disk leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from safelight.errors import SafelightError, StateDirectoryError, StorageFullError
from safelight.serving.jobs.folder import FolderFiles
from tests.serving.disks import fill, make_read_only, small_disk
from tests.serving.jobs.folder_outputs import an_output, names, publish, stage, with_outputs
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA


@pytest.mark.parametrize(("schema", "output_format"), [(IMAGE_SCHEMA, "png"), (VIDEO_SCHEMA, "mp4")])
def test_a_file_is_synced_then_named_then_its_directory_synced(tmp_path, monkeypatch, schema, output_format):
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def logged_sync(descriptor):
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def logged_replace(path, target):
        done.append(("name", Path(target).name))
        return replace(path, target)

    async def use(outputs):
        monkeypatch.setattr(os, "fsync", logged_sync)
        monkeypatch.setattr(Path, "replace", logged_replace)
        return await publish(outputs, "job", [an_output(schema)], schema, output_format)

    (stored,) = with_outputs(tmp_path, use)
    final = ("name", stored.name)
    last_rename = max(index for index, (what, name) in enumerate(done) if what == "name")
    synced = [name for what, name in done[: done.index(final)] if what == "sync"]
    assert len(synced) == len(names(tmp_path)) and all(name.startswith(".tmp-") for name in synced)
    assert done[last_rename + 1 :] == [("sync", tmp_path.name)]


@pytest.mark.parametrize(("schema", "output_format"), [(IMAGE_SCHEMA, "png"), (VIDEO_SCHEMA, "mp4")])
def test_a_full_disk_ends_one_writing_and_leaves_nothing(tmp_path, schema, output_format):
    made = [an_output(schema, "[noise]", height=256, width=256) for _ in range(3)]

    async def use(outputs):
        await publish(outputs, "before", [an_output(schema)], schema, output_format)
        kept = names(outputs.directory)
        for leave in (0, 4096, 300_000):  # at the first byte, in the first file, and (for pictures) in the second
            filling = fill(tmp_path / "disk", leave)
            with pytest.raises(StorageFullError) as error:
                await stage(outputs, "no", made, output_format, schema)
            assert str(tmp_path) not in str(error.value) and error.value.code == "storage_full"
            with pytest.raises(StorageFullError):
                await outputs.save({"first": b"1", "no": os.urandom(1 << 20)})
            assert names(outputs.directory) == kept
            filling.unlink()
        await publish(outputs, "after", [an_output(schema)], schema, output_format)
        assert names(outputs.directory) == kept | {name.replace("before", "after") for name in kept}

    with small_disk(tmp_path / "disk") as disk:
        with_outputs(disk / "outputs", use)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_no_room_at_any_call_leaves_nothing(tmp_path, monkeypatch, call, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    async def use(outputs):
        with monkeypatch.context() as patch, pytest.raises(StorageFullError):
            patch.setattr(Path if call == "replace" else os, call, refuse)
            await publish(outputs, "no", [an_output(), an_output()])
        assert names(tmp_path) == set()
        await publish(outputs, "yes", [an_output()])

    with_outputs(tmp_path, use)


def test_what_fails_otherwise_leaves_nothing_and_names_no_path(tmp_path):
    async def use(outputs):
        with pytest.raises((TypeError, ValueError)):
            await stage(outputs, "no", [an_output(), an_output(prompt="[garbage]")], "png", IMAGE_SCHEMA)
        odd = an_output(VIDEO_SCHEMA)
        odd.media[0] = odd.media[0][:0]
        with pytest.raises(SafelightError) as error:
            await stage(outputs, "no", [an_output(VIDEO_SCHEMA), odd], "mp4", VIDEO_SCHEMA)
        assert str(tmp_path) not in str(error.value)
        batch, _ = await stage(outputs, "no", [an_output()], "png", IMAGE_SCHEMA)
        await outputs.discard(batch)

    with_outputs(tmp_path, use)
    assert names(tmp_path) == set()


def test_saving_and_removing(tmp_path):
    async def use(outputs):
        await outputs.save({"a": b"1", "b": b"2"})
        assert outputs.path("a").read_bytes() == b"1"
        await outputs.remove(["a", "never"])
        for name in ("../b", "/etc/passwd", ".tmp-1", "x/b"):
            with pytest.raises(AssertionError):
                outputs.path(name)

    with_outputs(tmp_path, use)
    assert names(tmp_path) == {"b"}


def test_directories_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirectoryError, match="cannot be used"):
        FolderFiles(tmp_path / "file")
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used") as error:
            FolderFiles(disk / "outputs")
        assert error.value.exit_code == 5
        make_read_only(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            FolderFiles(disk / "outputs")
