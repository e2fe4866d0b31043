"""Whether input pictures can be decoded. Large ones are tried in a process of their own. Imports no torch.

A picture of 25 megapixels takes 100 to 400 MB while it is decoded, by its format, and Pillow lets no other thread run
while it decodes WebP. The process that is there for that lasts as long as one request's pictures, and takes with it
whatever a file does to a decoder.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO

from starlette.types import Receive

from safelight import media
from safelight.clips import EncodedClip
from safelight.encoded import EncodedImage
from safelight.runtime.processes import python_command, safe_environment
from safelight.serving.http.disconnects import unless_gone
from safelight.serving.input_pictures import damaged

logger = logging.getLogger(__name__)

SMALL_PIXELS = 1 << 21
"""Of a picture that is tried in this process: tens of milliseconds, and megabytes."""
_MOST_MEMORY = 2 << 30
"""Of addresses in the other process."""
_SECONDS = 60.0
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="safelight-decoding")
"""A picture of 25 megapixels takes 200 MB while it is tried, and no more than one does."""
_GOOD, _DAMAGED = b"1", b"0"
_CLIP = "clip"
"""In the place of a picture's mode: it is a video."""


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


def _check_apart(pictures: Sequence[tuple[str, Given]]) -> None:
    command, pipe = python_command(__name__), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=safe_environment()) as process:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        try:
            for param, image in pictures:
                answer = _asked(process.stdin, process.stdout, image)
                if not answer:
                    logger.warning("the process that tries pictures ended at one of %d x %d", image.width, image.height)
                if answer != _GOOD:
                    raise damaged(image.kind, param)
        finally:
            timer.cancel()
            process.kill()
            with suppress(BrokenPipeError):  # what it has not read is not written any more
                process.stdin.close()


def _asked(to: IO[bytes], back: IO[bytes], image: Given) -> bytes:
    """Return the other process's answer for one picture; nothing if it ended."""
    file, mode = image.file, image.mode if isinstance(image, EncodedImage) else _CLIP
    try:
        to.write(f"{image.kind} {mode} {image.width} {image.height} {len(file)}\n".encode("ascii"))
        to.write(file)
        to.flush()
    except BrokenPipeError:
        return b""
    return back.read(1)


def main() -> None:
    """Answer for one picture after the other, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    while line := sys.stdin.buffer.readline():
        kind, mode, width, height, length = line.decode("ascii").split()
        file, size = sys.stdin.buffer.read(int(length)), (int(width), int(height))
        image = EncodedClip(file, kind, size, 1) if mode == _CLIP else EncodedImage(file, kind, mode, size)
        sys.stdout.buffer.write(_GOOD if decodes(image) else _DAMAGED)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
