"""The outputs directory: files appear whole, or not at all; and how pixels become files. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from safelight import media, video
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, OutputError, SafelightError, StateDirectoryError, StorageError
from safelight.runtime.client import Media, Output
from safelight.serving import directories
from safelight.serving.jobs import Kept, StoredFile, StoredOutput
from safelight.serving.spool import Stored

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Pixels = NDArray[np.uint8]

MEDIA_TYPES: Mapping[str, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
}
"""By output format; a file's name ends in the format."""
THUMBNAIL_SIDE, TILE_SIDE, MAX_TILES = 512, 256, 16
NUM_THREADS = 2
CLEANED = 500
"""Files of which a start asks the store at a time."""
_UNKNOWN = Kept(is_over=False)
_MAX_EXIF_TEXT = 60_000
"""JPEG holds 65,533 bytes of EXIF."""
_LONG_TEXT = 1_000
_LARGE_PICTURE = 8 << 20
"""Values of a picture from which on it is encoded alone: it takes as much again, and its file's length."""
_ONE_LARGE = threading.Lock()


def encode_image(
    array: Pixels, output_format: str, compression: int | None = None, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Return a picture's file.

    Args:
        array: uint8 [H, W, C] of 3 or 4 channels.
        output_format: png, jpeg or webp.
        compression: quality from 0 to 100 of jpeg and webp; None is 95 for jpeg, and lossless for webp.
        metadata: what JSON can hold; in a PNG's text, or the EXIF user comment of the others.

    Raises:
        InvalidParameterError: for an unknown format, or for an alpha channel in jpeg, which has none.

    """
    if output_format not in _IMAGE_ENCODERS:
        raise InvalidParameterError("output_format", output_format, f"one of {', '.join(_IMAGE_ENCODERS)}")
    if output_format == "jpeg" and array.shape[-1] == 4:
        raise InvalidParameterError("output_format", "jpeg", "png or webp: this picture has an alpha channel")
    file = io.BytesIO()
    with _ONE_LARGE if array.size > _LARGE_PICTURE else contextlib.nullcontext():
        _IMAGE_ENCODERS[output_format](Image.fromarray(array), file, compression, metadata)
    return file.getvalue()


def _png(image: Image.Image, file: io.BytesIO, compression: int | None, metadata: Mapping[str, Any] | None) -> None:
    text = PngImagePlugin.PngInfo()
    if metadata is not None:
        text.add_text(media.METADATA_KEY, json.dumps(metadata))
    # zlib's level 1: level 6 takes several times as long for files that are little smaller.
    image.save(file, format="PNG", compress_level=1, pnginfo=text)


def _jpeg(image: Image.Image, file: io.BytesIO, compression: int | None, metadata: Mapping[str, Any] | None) -> None:
    quality = 95 if compression is None else compression
    image.save(file, format="JPEG", quality=quality, subsampling=0, **_exif(metadata, _MAX_EXIF_TEXT))


def _webp(image: Image.Image, file: io.BytesIO, compression: int | None, metadata: Mapping[str, Any] | None) -> None:
    if compression is None:
        image.save(file, format="WEBP", lossless=True, method=0, **_exif(metadata))
    else:
        image.save(file, format="WEBP", quality=compression, **_exif(metadata))


def _exif(metadata: Mapping[str, Any] | None, limit: float = math.inf) -> dict[str, Image.Exif]:
    """Return the keyword for EXIF; long texts are left out where the whole is more than the format holds."""
    if metadata is None:
        return {}
    text = json.dumps(metadata)
    if len(text) > limit:
        kept = {k: v for k, v in metadata.items() if not (isinstance(v, str) and len(v) > _LONG_TEXT)}
        text = json.dumps(kept)
    return {"exif": media.exif(text)}


_IMAGE_ENCODERS: Mapping[str, Callable[[Image.Image, io.BytesIO, int | None, Mapping[str, Any] | None], None]] = {
    "png": _png,
    "jpeg": _jpeg,
    "webp": _webp,
}


def thumbnail(frames: Media) -> bytes:
    """Return WebP of the first frame of a video [T, H, W, 3], within a square of 512 pixels."""
    return encode_image(np.asarray(_fitted(frames[0], THUMBNAIL_SIDE)), "webp", 80)


def spritesheet(frames: Media, output_format: str = "jpeg") -> bytes:
    """Return jpeg or webp: at most 16 frames of a video [T, H, W, 3], evenly apart, in rows as in a text."""
    count = min(MAX_TILES, len(frames))
    chosen = [_fitted(frames[index * len(frames) // count], TILE_SIDE) for index in range(count)]
    columns = math.ceil(math.sqrt(count))
    width, height = chosen[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height))
    for index, tile in enumerate(chosen):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return encode_image(np.asarray(sheet), output_format, 85)


def _fitted(frame: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


@dataclass(frozen=True)
class Staged:
    """Files that are written and synced under temporary names, and what they will be called."""

    temporaries: Mapping[str, Path]
    outputs: Sequence[StoredOutput]

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        extras = [file.num_bytes for output in self.outputs for file in output.extras.values()]
        return sum(output.num_bytes for output in self.outputs) + sum(extras)


class Outputs:
    """Files of jobs, in one directory, written by a pool of threads and never in the event loop."""

    def __init__(self, directory: Path) -> None:
        """Open the directory, or make it.

        Raises:
            StateDirectoryError: if it cannot be written, is full, is neither empty nor ours, or is held by another
                server, as where it is a link to that one's.

        """
        self.directory = directory
        directories.check_ours("outputs directory", directory, directories.are_outputs)
        try:
            self.check_writable()
            directories.mark(directory)
        except OSError as error:
            message = f"outputs directory {str(directory)!r} cannot be used: {error.strerror}"
            raise StateDirectoryError(message) from error
        self._lock = directories.hold("outputs directory", directory, directories.MARKER)
        self._one_video = threading.Lock()
        """An encoder of videos holds tens of megabytes, and uses every core by itself."""
        self._threads = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="safelight-media")

    def check_writable(self) -> None:
        """Write a small file and remove it; `OSError` says why that is not possible. This waits for the disk."""
        self._write(bytes(4096)).unlink()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work of encoding or decoding in the pool."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def clean(self, kept: Callable[[frozenset[str]], Awaitable[Mapping[str, Kept]]]) -> None:
        """Remove what a server left that died, and nothing else; name what is left over. Only before any are written.

        Removed are files under our temporary names, and files of jobs that are over and do not have them.

        Args:
            kept: says what is known of jobs by their ids, of which it is given some at a time.

        Raises:
            StateDirectoryError: if that cannot be done.

        """
        others: list[str] = []
        try:
            with os.scandir(self.directory) as entries:
                while names := await self.run(lambda: [entry.name for entry in itertools.islice(entries, CLEANED)]):
                    jobs = frozenset(job_id for job_id in map(directories.job_of, names) if job_id is not None)
                    others += await self.run(self._clean, names, await kept(jobs))
        except OSError as error:
            raise StateDirectoryError(f"outputs directory {str(self.directory)!r}: {error.strerror}") from error
        if others:
            what = "belong to no job that has ended, and are kept"
            logger.warning("outputs directory %r: %s %s", str(self.directory), directories.listed(others), what)

    async def save(self, files: Mapping[str, bytes | Stored]) -> None:
        """Write files by name, durably.

        Raises:
            StorageError: if there is no room, or the disk fails; none of them is there then.

        """
        await self.run(self._save, files)

    async def stage(
        self, stem: str, outputs: Sequence[Output], output_format: str, compression: int | None, schema: ModelSchema
    ) -> Staged:
        """Encode outputs and write them under temporary names, with how they were made inside.

        Args:
            stem: what their names will begin with.
            outputs: as the engine gave them.
            output_format: png, jpeg or webp for pictures, mp4 for videos.
            compression: as `encode_image` takes it.
            schema: of the model that made them.

        Raises:
            StorageError: if there is no room, or the disk fails; nothing is left then.
            SafelightError: if they cannot be encoded.

        """
        return await self.run(self._stage, stem, outputs, output_format, compression, schema)

    async def publish(self, staged: Staged) -> None:
        """Give staged files their names, durably.

        Raises:
            StorageError: if there is no room, or the disk fails; nothing is left then.

        """
        await self.run(self._publish, staged)

    async def discard(self, staged: Staged) -> None:
        """Remove staged files that will not be published."""
        await self.run(self._remove, list(staged.temporaries.values()))

    async def remove(self, names: Iterable[str]) -> None:
        """Remove files by name; one that is not there is none."""
        await self.run(self._remove, [self.path(name) for name in names])

    async def remove_others(self, job_id: str, names: Iterable[str]) -> None:
        """Remove a job's files but for those of these names: what an attempt has left that was not finished."""
        await self.run(self._remove_others, job_id, frozenset(names))

    async def read(self, name: str) -> bytes:
        """Return a file.

        Raises:
            StorageError: if it cannot be read.

        """
        return await self.run(self._read, name)

    def path(self, name: str) -> Path:
        """Return where a file of a job is. Names come from jobs, never from a client."""
        assert name == Path(name).name and not name.startswith(".")
        return self.directory / name

    async def close(self) -> None:
        """Wait for what is being encoded and written at this moment, and end the threads."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        os.close(self._lock)

    def _clean(self, names: Iterable[str], kept: Mapping[str, Kept]) -> list[str]:
        """Remove what may be of these files, and return the names of those that nobody knows."""
        others = []
        for name in names:
            job = kept.get(directories.job_of(name) or "", _UNKNOWN)
            if name in job.names:
                directories.make_private(self.directory / name)
            elif name != directories.MARKER and not _removed(self.directory / name, job.is_over):
                others.append(name)
        return others

    def _remove_others(self, job_id: str, names: frozenset[str]) -> None:
        with _named_failures():
            others = [path for path in self.directory.iterdir() if directories.job_of(path.name) == job_id]
            _remove(path for path in others if path.name not in names)

    def _remove(self, paths: Iterable[Path]) -> None:
        with _named_failures():
            _remove(paths)

    def _save(self, files: Mapping[str, bytes | Stored]) -> None:
        with self._temporaries() as temporaries:
            for name, data in files.items():
                temporaries[name] = self._write(data if isinstance(data, bytes) else data.read())
            self._rename(temporaries)

    def _stage(
        self, stem: str, outputs: Sequence[Output], output_format: str, compression: int | None, schema: ModelSchema
    ) -> Staged:
        stored: list[StoredOutput] = []
        with self._temporaries() as temporaries:
            for output in outputs:
                metadata = media.file_metadata(schema.model, schema.pipeline_name, output.params)
                if output_format == "mp4":
                    for frames in output.media:
                        name = f"{stem}.{len(stored)}.{output_format}"
                        with self._one_video:
                            stored.append(self._stage_video(name, frames, output, metadata, temporaries))
                    continue
                for array in output.pictures():
                    name = f"{stem}.{len(stored)}.{output_format}"
                    temporaries[name] = self._write(encode_image(array, output_format, compression, metadata))
                    stored.append(_stored(name, temporaries[name], array.shape, output.seed))
        return Staged(temporaries, stored)

    def _stage_video(
        self, name: str, frames: Media, output: Output, metadata: Mapping[str, Any], temporaries: dict[str, Path]
    ) -> StoredOutput:
        temporaries[name] = self._temporary(".mp4")
        fps = output.params["fps"]
        video.save_video(frames, temporaries[name], fps, metadata)
        directories.make_private(temporaries[name])  # it is on the disk, and has the mode that the encoder gave it
        extras = {"thumbnail": (thumbnail(frames), "webp"), "spritesheet": (spritesheet(frames), "jpeg")}
        files = {}
        for variant, (data, ending) in extras.items():
            file = StoredFile(f"{name}.{variant}.{ending}", len(data))
            temporaries[file.name] = self._write(data)
            files[variant] = file
        return _stored(name, temporaries[name], frames.shape, output.seed, len(frames), fps, files)

    def _read(self, name: str) -> bytes:
        with _named_failures():
            return self.path(name).read_bytes()

    def _publish(self, staged: Staged) -> None:
        with self._temporaries(staged.temporaries) as temporaries:
            self._rename(temporaries)

    @contextlib.contextmanager
    def _temporaries(self, existing: Mapping[str, Path] | None = None) -> Iterator[dict[str, Path]]:
        """Collect temporary files by the names they will have; if what is done with them fails, neither stays."""
        found = dict(existing or {})
        try:
            with _named_failures():
                yield found
        except BaseException:
            with contextlib.suppress(OSError):  # the disk fails: the next start removes them
                _remove([*found.values(), *(self.path(name) for name in found)])
            raise

    def _temporary(self, ending: str = "") -> Path:
        return directories.temporary_path(self.directory, ending)

    def _write(self, data: bytes) -> Path:
        """Write and sync a temporary file; if that fails, it does not stay."""
        path = self._temporary()
        directories.write_private(path, data)
        return path

    def _rename(self, temporaries: Mapping[str, Path]) -> None:
        for name, path in temporaries.items():
            path.replace(self.path(name))
        directories.sync(self.directory)


def _stored(
    name: str,
    path: Path,
    shape: tuple[int, ...],
    seed: int,
    num_frames: int | None = None,
    fps: int | None = None,
    extras: Mapping[str, StoredFile] | None = None,
) -> StoredOutput:
    height, width = shape[-3:-1]
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]
    size = path.stat().st_size
    return StoredOutput(name, media_type, width, height, size, seed, num_frames, fps, dict(extras or {}))


@contextlib.contextmanager
def _named_failures() -> Iterator[None]:
    """Turn a failure of the disk into an error whose message holds no path."""
    try:
        yield
    except (OSError, OutputError) as error:
        reason = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(reason, OSError):
            raise SafelightError("the output could not be written") from error
        raise StorageError.of(reason, "the outputs") from error


def _removed(path: Path, is_over: bool) -> bool:
    """Remove what a server of ours left unfinished, or what a job has no more that is over; say whether it is gone."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode) and directories.is_temporary_folder(path.name):
        inside = list(path.iterdir())
        if not all(directories.is_temporary(each.name) and stat.S_ISREG(each.lstat().st_mode) for each in inside):
            return False
        _remove(inside)
        path.rmdir()
        return True
    if stat.S_ISREG(mode) and (directories.is_temporary(path.name) or is_over):
        path.unlink()
        return True
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
