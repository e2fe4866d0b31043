"""Messages and their arrays through real sockets, and what a full disk or a dead supervisor does to them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest

from safelight.core.params import SamplingParams
from safelight.errors import StorageError
from safelight.runtime import transport
from safelight.runtime.client import GenerationRequest, Ticket
from safelight.runtime.messages import Cancel, Failed, Heartbeat, OutputMade, Progressed
from safelight.runtime.supervisor.live import LiveRequest
from safelight.runtime.supervisor.supervisor import shaped
from safelight.runtime.transport import ServerChannel, WorkerChannel
from safelight.runtime.video_files import SPOOLED_BYTES, SpooledFrames

SECONDS = 30.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "socket"


async def next_message(channel: ServerChannel):
    """Return the next message that is no heartbeat, with its arrays."""
    while True:
        message, arrays = await asyncio.wait_for(channel.receive(), SECONDS)
        if not isinstance(message, Heartbeat):
            return message, arrays


def video(num_bytes: int) -> np.ndarray:
    frames = -(-num_bytes // (64 * 64 * 3))
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 64, 3), np.uint8)


def test_an_array_on_a_message_of_progress_reaches_whoever_waits(path):
    """Through real sockets: its shape and values are what the worker sent."""
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    async def test():
        channel = ServerChannel(path)
        worker = WorkerChannel(path, os.getppid())
        try:
            sent = Progressed("r0", 0, "denoising", 2, 5, 1.0, shapes=[picture.shape], dtypes=["uint8"])
            await asyncio.to_thread(worker.send, sent, [picture])
            message, arrays = await next_message(channel)
        finally:
            worker.close()
            channel.close()
        live = LiveRequest(Ticket(GenerationRequest("r0", SamplingParams(prompt="x", seed=0, n=1))), 0.0, 1)
        assert isinstance(message, Progressed)
        live.advance(message, shaped(message, arrays))
        (shown,) = live.ticket.progress.arrays
        assert isinstance(shown, np.ndarray)
        assert live.ticket.progress.step == 2 and np.array_equal(shown, picture)

    asyncio.run(test())


@pytest.mark.parametrize("num_bytes", [1, SPOOLED_BYTES])
def test_a_long_video_goes_through_a_file_that_is_gone_when_it_was_read(path, num_bytes):
    frames = video(num_bytes)

    async def test():
        channel = ServerChannel(path)
        worker = WorkerChannel(str(path), os.getppid())
        try:
            worker.send(OutputMade("r0", 0, [frames.shape], ["uint8"], 3, {}, {}, []), [frames])
            message, arrays = await next_message(channel)
        finally:
            worker.close()
            channel.close()
        assert isinstance(message, OutputMade)
        (found,) = shaped(message, arrays)
        assert np.array_equal(np.stack(list(found)), frames)
        if isinstance(found, SpooledFrames):
            found._file.close()
        assert isinstance(found, SpooledFrames) == (frames.nbytes >= SPOOLED_BYTES)

    asyncio.run(test())
    assert not list(path.parent.iterdir())


def test_a_full_disk_fails_the_request_and_not_the_channel(path, monkeypatch):
    def full(*args):
        raise StorageError.of(OSError(28, "No space left on device"), "a video")

    monkeypatch.setattr(transport, "spool", full)
    frames = video(SPOOLED_BYTES)

    async def test():
        channel = ServerChannel(path)
        worker = WorkerChannel(str(path), os.getppid())
        try:
            worker.send(OutputMade("r0", 0, [frames.shape], ["uint8"], 3, {}, {}, []), [frames])
            worker.send(Failed("r1", "cancelled", "gone"))
            first, second = (await next_message(channel))[0], (await next_message(channel))[0]
        finally:
            worker.close()
            channel.close()
        assert isinstance(first, Failed) and first.request_id == "r0" and "video" in first.message
        assert second == Failed("r1", "cancelled", "gone")

    asyncio.run(test())


def test_what_is_sent_to_a_worker_arrives_in_order_and_nothing_is_waited_for(path):
    async def test():
        channel = ServerChannel(path)
        worker = WorkerChannel(str(path), os.getppid())
        try:
            assert worker.receive(0) is None and worker.receive(0.01) is None
            for index in range(50):
                channel.send(Cancel(f"r{index}"))
            got = [await asyncio.to_thread(worker.receive, SECONDS) for _ in range(50)]
        finally:
            worker.close()
            channel.close()
        assert got == [(Cancel(f"r{index}"), []) for index in range(50)]

    asyncio.run(test())


def test_a_worker_ends_without_its_supervisor(path):
    """Its parent is another process than the one that it was given."""
    script = (
        "import sys, time\n"
        "from safelight.runtime.transport import WorkerChannel\n"
        "channel = WorkerChannel(sys.argv[1], 1 << 22)\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], timeout=SECONDS)
    assert ended.returncode == 1
