"""Whether input pictures can be decoded. Large ones, and videos, are tried in a process of their own. Imports no torch.

A picture of 25 megapixels takes 100 to 400 MB while it is decoded, by its format, and Pillow lets no other thread run
while it decodes WebP. The process that is there for that lasts as long as one request's pictures, and takes with it
whatever a file does to a decoder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO

from starlette.types import Receive

from safelight import media
from safelight.clips import EncodedClip, clip_kind, damaged_clip
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError
from safelight.file_kinds import HEAD_BYTES
from safelight.runtime.processes import python_command, safe_environment
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.http.spool import Stored
from safelight.serving.input_pictures import damaged, open_picture
from safelight.serving.limits import Limits

logger = logging.getLogger(__name__)

SMALL_PIXELS = 1 << 21
"""Of a picture that is tried in this process: tens of milliseconds, and megabytes."""
_MOST_MEMORY = 2 << 30
"""Of addresses in the other process."""
_SECONDS = 60.0
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="safelight-decoding")
"""A picture of 25 megapixels takes 200 MB while it is tried, and no more than one does."""
_GOOD, _DAMAGED = b"1", b"0"
_CLIP, _HEADER = "clip", "header"
"""In the place of a picture's mode: it is a video, that is to be decoded, or whose header is to be read."""
Given = EncodedImage | EncodedClip


async def try_pictures(receive: Receive, pictures: Sequence[tuple[str, Given]]) -> None:
    """See that a request's pictures can be decoded: in a thread, one at a time. They are kept as files.

    Raises:
        InvalidParameterError: naming the field of one that is damaged.
        ClientDisconnect: if the client goes away; pictures whose turn has not come are not tried then.

    """
    if pictures:
        loop = asyncio.get_running_loop()
        await unless_gone(receive, loop.run_in_executor(_DECODER, check_all, pictures))


def check_all(pictures: Sequence[tuple[str, Given]]) -> None:
    """Decode pictures one at a time, and let their pixels go. It takes a while: run it in a thread, one at a time.

    Args:
        pictures: and the field that each was given for.

    Raises:
        InvalidParameterError: naming the field of the first that is damaged.

    """
    large = []
    for param, image in pictures:
        if isinstance(image, EncodedClip) or image.width * image.height > SMALL_PIXELS:
            large.append((param, image))
        elif not decodes(image):
            raise damaged(image.kind, param)
    if large:
        _check_apart(large)


def decodes(image: Given) -> bool:
    """Say whether a picture or a clip can be decoded, in this process."""
    try:
        image.check()
    except (*media.UNREADABLE, MemoryError):
        return False
    return True


def open_input(file: bytes | Stored, param: str, limits: Limits) -> Given:
    """Return a clip, of which what its file says has been read; or a picture that is one of its frames.

    A library's code for videos reads nothing in this process.

    Raises:
        InvalidParameterError: if it is neither, or too large.

    """
    head = file[:HEAD_BYTES] if isinstance(file, bytes) else file.head(HEAD_BYTES)
    kind = clip_kind(head)
    if kind is None:
        return open_picture(file, param, limits)
    data, kept = (file, file) if isinstance(file, bytes) else (file.read(), file)
    with _other_process() as (to, back):
        _send(to, kind, _HEADER, (0, 0), data)
        said = back.readline()
    if not said:
        logger.warning("the process that tries pictures ended at the header of a video of %d bytes", len(data))
        raise damaged_clip(kind, param)
    answer = json.loads(said)
    if "error" in answer:
        raise InvalidParameterError.rebuilt(f"{param}: {answer['error']}", param)
    return EncodedClip(kept, kind, (answer["width"], answer["height"]), answer["num_frames"])


def _check_apart(pictures: Sequence[tuple[str, Given]]) -> None:
    with _other_process() as (to, back):
        for param, image in pictures:
            mode = image.mode if isinstance(image, EncodedImage) else _CLIP
            _send(to, image.kind, mode, (image.width, image.height), image.file)
            answer = back.read(1)
            if not answer:
                logger.warning("the process that tries pictures ended at one of %d x %d", image.width, image.height)
            if answer != _GOOD:
                raise damaged(image.kind, param) if mode != _CLIP else damaged_clip(image.kind, param)


@contextmanager
def _other_process() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Give the pipes to a process that looks at files, for a while."""
    command, pipe = python_command(__name__), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=safe_environment()) as process:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        try:
            yield process.stdin, process.stdout
        finally:
            timer.cancel()
            process.kill()
            with suppress(BrokenPipeError):  # what it has not read is not written any more
                process.stdin.close()


def _send(to: IO[bytes], kind: str, mode: str, size: tuple[int, int], file: bytes) -> None:
    """Send a file; to a process that has ended nothing, whose answer is none then."""
    with suppress(BrokenPipeError):
        to.write(f"{kind} {mode} {size[0]} {size[1]} {len(file)}\n".encode("ascii"))
        to.write(file)
        to.flush()


def main() -> None:
    """Answer for one picture after the other, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    while line := sys.stdin.buffer.readline():
        kind, mode, width, height, length = line.decode("ascii").split()
        file, size = sys.stdin.buffer.read(int(length)), (int(width), int(height))
        if mode == _HEADER:
            sys.stdout.buffer.write(_read_header(file) + b"\n")
        else:
            image = EncodedClip(file, kind, size, 1) if mode == _CLIP else EncodedImage(file, kind, mode, size)
            sys.stdout.buffer.write(_GOOD if decodes(image) else _DAMAGED)
        sys.stdout.buffer.flush()


def _read_header(file: bytes) -> bytes:
    try:
        clip = EncodedClip.read(file, "file")
    except InvalidParameterError as error:
        return json.dumps({"error": str(error).removeprefix("file: ")}).encode()
    return json.dumps({"width": clip.width, "height": clip.height, "num_frames": clip.num_frames}).encode()


if __name__ == "__main__":
    main()
