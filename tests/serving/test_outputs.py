"""The outputs directory: whole files or none, full disks, and pixels into files."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from safelight import media, video
from safelight.errors import InvalidParameterError, SafelightError, StateDirectoryError, StorageFullError
from safelight.preparation import prepare
from safelight.serving import outputs as module
from safelight.serving.directories import MARKER
from safelight.serving.outputs import Outputs, encode_image, spritesheet, thumbnail
from tests.serving.disks import fill, make_read_only, small_disk
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA, make_output


def an_output(schema=IMAGE_SCHEMA, prompt="a", **fields):
    return make_output(prepare(schema, {"prompt": prompt, "seed": 7, **fields})[0])


def with_outputs(folder: Path, use):
    async def main():
        outputs = Outputs(folder)
        try:
            return await use(outputs)
        finally:
            await outputs.close()

    return asyncio.run(main())


async def publish(outputs: Outputs, stem: str, made, schema=IMAGE_SCHEMA, output_format="png"):
    staged = await outputs.stage(stem, made, output_format, None, schema)
    await outputs.publish(staged)
    return staged.outputs


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARKER}


@pytest.mark.parametrize("prompt", ["a", "a [alpha]"])
@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_pixels_come_back_from_lossless_formats(output_format, prompt):
    array = an_output(prompt=prompt).media[0]
    data = encode_image(array, output_format)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == output_format.upper()
        assert np.array_equal(np.asarray(image), array)


def test_a_png_is_of_level_one():
    data = encode_image(an_output().media[0], "png")
    start = data.index(b"IDAT") + 4
    assert data[start + 1] >> 6 == 0, "zlib's mark of its fastest levels"


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_quality(output_format):
    array = an_output(prompt="[noise]").media[0]
    sizes = [len(encode_image(array, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))
    default = encode_image(array, output_format)
    assert len(default) > sizes[1]
    with Image.open(io.BytesIO(default)) as image:
        assert image.format == output_format.upper() and image.size == (96, 64)


def test_jpeg_has_no_alpha_and_unknown_formats_are_named():
    array = an_output(prompt="[alpha]").media[0]
    for output_format, reason in (("jpeg", "alpha"), ("gif", "one of png, jpeg, webp"), ("../png", "one of")):
        with pytest.raises(InvalidParameterError, match=reason) as error:
            encode_image(array, output_format)
        assert error.value.param == "output_format"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a caf\u00e9", "\U0001f600" * 8000], ids=["short", "long"])
def test_a_picture_says_how_it_was_made(tmp_path, output_format, prompt):
    output = an_output(prompt=prompt)
    metadata = media.file_metadata(IMAGE_SCHEMA.model, IMAGE_SCHEMA.pipeline_name, output.params)
    path = tmp_path / "picture"
    path.write_bytes(encode_image(output.media[0], output_format, None, metadata))
    found = media.read_metadata(path)
    if output_format == "jpeg" and len(prompt) > 1000:  # more than JPEG can hold
        assert found.pop("prompt", None) is None and metadata.pop("prompt")
    assert found == metadata
    assert found["seed"] == 7 and found["model"] == "stub/pictures" and "output_type" not in found


def test_outputs_are_named_files_with_what_is_known_of_them(tmp_path):
    made = [an_output(), an_output(seed=8, width=48)]

    async def use(outputs):
        staged = await outputs.stage("image_1", made, "png", None, IMAGE_SCHEMA)
        assert all(name.startswith(".tmp-") for name in names(tmp_path)) and len(names(tmp_path)) == 2
        await outputs.publish(staged)
        return staged

    staged = with_outputs(tmp_path, use)
    assert names(tmp_path) == {"image_1.0.png", "image_1.1.png"}
    first, second = staged.outputs
    assert (first.width, first.height, first.seed, first.media_type) == (96, 64, 7, "image/png")
    assert (second.name, second.width, second.seed, second.num_frames) == ("image_1.1.png", 48, 8, None)
    sizes = [(tmp_path / output.name).stat().st_size for output in staged.outputs]
    assert [output.num_bytes for output in staged.outputs] == sizes and staged.num_bytes == sum(sizes)
    with Image.open(tmp_path / second.name) as image:
        assert np.array_equal(np.asarray(image), made[1].media[0])


def test_a_video_has_a_thumbnail_and_a_spritesheet(tmp_path):
    made = an_output(VIDEO_SCHEMA)
    (stored,) = with_outputs(tmp_path, lambda o: publish(o, "video_1", [made], VIDEO_SCHEMA, "mp4"))
    assert (stored.media_type, stored.width, stored.height) == ("video/mp4", 48, 32)
    assert (stored.num_frames, stored.fps, stored.seed) == (9, 8, 7)
    path = tmp_path / stored.name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert len(list(container.decode(stream))) == 9
        assert stream.average_rate is not None and float(stream.average_rate) == 8.0
    assert video.read_metadata(path) == media.file_metadata(VIDEO_SCHEMA.model, VIDEO_SCHEMA.pipeline_name, made.params)
    extras = stored.extras
    assert names(tmp_path) == {stored.name, *(file.name for file in extras.values())}
    assert [(tmp_path / file.name).stat().st_size for file in extras.values()] == [e.num_bytes for e in extras.values()]
    with Image.open(tmp_path / extras["thumbnail"].name) as image:
        assert (image.format, image.size) == ("WEBP", (48, 32))
    with Image.open(tmp_path / extras["spritesheet"].name) as image:
        assert (image.format, image.size) == ("JPEG", (3 * 48, 3 * 32))


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (16, (4, 4)), (81, (4, 4))])
def test_sheets_show_frames_in_order(count, grid):
    frames = np.stack([np.full((300, 600, 3), 255 * i // max(1, count - 1), np.uint8) for i in range(count)])
    with Image.open(io.BytesIO(spritesheet(frames, "webp"))) as sheet:
        assert sheet.size == (256 * grid[0], 128 * grid[1])
        grey = np.asarray(sheet.convert("L"))
    tiles = [int(grey[128 * (i // grid[0]) + 9, 256 * (i % grid[0]) + 9]) for i in range(min(count, 16))]
    assert tiles == sorted(set(tiles))
    with Image.open(io.BytesIO(thumbnail(frames))) as image:
        assert image.size == (512, 256)


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


def test_encoding_is_never_in_the_event_loop(tmp_path, monkeypatch):
    threads: list[str] = []

    def noted(function):
        def call(*args):
            threads.append(threading.current_thread().name)
            return function(*args)

        return call

    for name in ("encode_image", "thumbnail", "spritesheet"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))

    async def use(outputs):
        await publish(outputs, "a", [an_output()])
        await publish(outputs, "b", [an_output(VIDEO_SCHEMA)], VIDEO_SCHEMA, "mp4")

    with_outputs(tmp_path, use)
    assert threads and all(name.startswith("safelight-media") for name in threads)


@pytest.mark.parametrize(("schema", "output_format"), [(IMAGE_SCHEMA, "png"), (VIDEO_SCHEMA, "mp4")])
def test_a_full_disk_ends_one_writing_and_leaves_nothing(tmp_path, schema, output_format):
    made = [an_output(schema, "[noise]", height=256, width=256) for _ in range(3)]

    async def use(outputs):
        await publish(outputs, "before", [an_output(schema)], schema, output_format)
        kept = names(outputs.directory)
        for leave in (0, 4096, 300_000):  # at the first byte, in the first file, and (for pictures) in the second
            filling = fill(tmp_path / "disk", leave)
            with pytest.raises(StorageFullError) as error:
                await outputs.stage("no", made, output_format, None, schema)
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
            await outputs.stage("no", [an_output(), an_output(prompt="[garbage]")], "png", None, IMAGE_SCHEMA)
        odd = an_output(VIDEO_SCHEMA)
        odd.media[0] = odd.media[0][:, :31]
        with pytest.raises(SafelightError) as error:
            await outputs.stage("no", [an_output(VIDEO_SCHEMA), odd], "mp4", None, VIDEO_SCHEMA)
        assert str(tmp_path) not in str(error.value)
        staged = await outputs.stage("no", [an_output()], "png", None, IMAGE_SCHEMA)
        await outputs.discard(staged)

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
        Outputs(tmp_path / "file")
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used") as error:
            Outputs(disk / "outputs")
        assert error.value.exit_code == 5
        make_read_only(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            Outputs(disk / "outputs")
