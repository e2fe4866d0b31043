"""Messages over one ZeroMQ socket in a directory that only its owner may enter. Imports no torch.

A message on the wire is one frame of msgpack, one that lists which arrays lie in files, and a frame for each array: its
bytes, or the name of its file in the socket's directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from safelight.errors import PortError, StorageError
from safelight.runtime.client import Media
from safelight.runtime.messages import Array, Failed, FromWorker, Heartbeat, OutputMade, ToWorker
from safelight.runtime.sockets import LIBRARY, SocketName
from safelight.runtime.video_files import SPOOLED_BYTES, spool, spooled

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.1
_ENCODER = msgspec.msgpack.Encoder()
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_SPOOLED = msgspec.msgpack.Decoder(list[int])
_FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def to_frames(message: ToWorker | FromWorker, arrays: Sequence[Array] = ()) -> list[bytes | memoryview]:
    """Return a message's frames; arrays are not copied."""
    return [_ENCODER.encode(message), *(np.ascontiguousarray(array).data.cast("B") for array in arrays)]


def is_spooled(array: Array) -> bool:
    """Say whether an array goes through a file: a long video as the API process encodes it."""
    return array.ndim == 4 and array.dtype == np.uint8 and array.nbytes >= SPOOLED_BYTES


def spooled_frames(message: FromWorker, arrays: Sequence[Array], folder: Path) -> list[bytes | memoryview]:
    """Return a message's frames for the API process, with long videos in files."""
    first, *others = to_frames(message, arrays)
    large = [index for index, array in enumerate(arrays) if is_spooled(array)]
    names: list[bytes] = []
    try:
        for index in large:
            others[index] = spool(memoryview(others[index]), folder)
            names.append(bytes(others[index]))
    except StorageError:
        for name in names:
            (folder / name.decode()).unlink(missing_ok=True)
        raise
    return [first, _ENCODER.encode(large), *others]


class ServerChannel:
    """The API process's end: listens on a socket file, for one worker.

    Args:
        path: of the socket, in a directory of mode 0700.

    Raises:
        PortError: if the socket cannot be made there.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        context = LIBRARY.hold()
        self._socket: zmq.asyncio.Socket | None = None
        try:
            self._name = SocketName(path)
        except BaseException:
            LIBRARY.let_go()
            raise
        try:
            self._socket = context.socket(zmq.PAIR)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.set_hwm(0)
            self._socket.bind(self._name.address)
        except zmq.ZMQError as error:
            self.close()
            raise PortError(f"TMPDIR: a socket cannot be made in {str(path.parent)!r}: {error.strerror}") from error

    def send(self, message: ToWorker, arrays: Sequence[Array] = ()) -> None:
        """Give a message to the socket, which keeps what the worker has not taken yet."""
        assert self._socket is not None
        sending = asyncio.ensure_future(self._socket.send_multipart(to_frames(message, arrays), copy=len(arrays) == 0))
        if sending.done():  # as it is where a worker is connected
            sending.result()

    async def receive(self) -> tuple[FromWorker, list[Media]]:
        """Wait for the next message, with its arrays: their bytes, [N] uint8."""
        assert self._socket is not None
        first, second, *others = await self._socket.recv_multipart(copy=False)
        message, large = _FROM_WORKER.decode(first.buffer), _SPOOLED.decode(second.buffer)
        arrays: list[Media] = [np.frombuffer(frame.buffer, np.uint8) for frame in others]
        try:
            for index in large:
                arrays[index] = spooled(bytes(others[index].buffer), self._path.parent)
        except OSError as error:  # this request's file, and nobody else's
            if not isinstance(message, OutputMade):
                raise
            found = StorageError.of(error, "the video on its way to be encoded")
            logger.error("%s: %s", found, error)
            return Failed(message.request_id, found.code, str(found)), []
        return message, arrays

    def close(self) -> None:
        """Let go of the socket, and delete its file, which the library leaves where a peer died."""
        if self._socket is not None:
            self._socket.close()
        LIBRARY.let_go(self._name)
        with contextlib.suppress(OSError):  # what else lies there goes with the folder
            self._path.unlink()


class WorkerChannel:
    """The worker's end: a thread that owns the socket, so that the heartbeat goes on while a unit runs.

    Args:
        path: of the socket.
        parent: process id of the supervisor: without it, the worker ends.

    Attributes:
        path: of the socket.
        heartbeat: makes the message that says that this process runs.

    Raises:
        PortError: if the socket's folder is not there.

    """

    def __init__(self, path: str, parent: int) -> None:
        self.path = Path(path)
        self.heartbeat: Callable[[], Heartbeat] = lambda: Heartbeat(0, {})
        self._name = SocketName(self.path)
        self._parent = parent
        self._incoming: queue.SimpleQueue[tuple[ToWorker, list[bytes]]] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[tuple[FromWorker, Sequence[Array]] | None] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    def receive(self, timeout: float | None) -> tuple[ToWorker, list[bytes]] | None:
        """Return the next message with its arrays' bytes.

        Args:
            timeout: seconds to wait for one; 0 does not wait.

        """
        try:
            return self._incoming.get(timeout=timeout) if timeout else self._incoming.get_nowait()
        except queue.Empty:
            return None

    def send(self, message: FromWorker, arrays: Sequence[Array] = ()) -> None:
        """Queue a message, from any thread."""
        self._outgoing.put((message, arrays))
        self._wake()

    def close(self) -> None:
        """Send what is queued, and end the thread."""
        self._outgoing.put(None)
        self._wake()
        self._thread.join(timeout=5)
        self._name.close()

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.setsockopt(zmq.LINGER, 2000)
            socket.set_hwm(0)
            socket.connect(self._name.address)
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake_read, zmq.POLLIN)
            beat = time.monotonic()
            while self._send(socket):
                ready = dict(poller.poll(timeout=max(0, int(1000 * (beat - time.monotonic())))))
                if self._wake_read in ready:
                    os.read(self._wake_read, 65536)
                if socket in ready:
                    self._receive(socket)
                if time.monotonic() >= beat:
                    self._beat()
                    beat = time.monotonic() + HEARTBEAT_SECONDS

    def _send(self, socket: zmq.Socket[bytes]) -> bool:
        """Send what is queued; False when the channel was closed."""
        while not self._outgoing.empty():
            queued = self._outgoing.get()
            if queued is None:
                return False
            message, arrays = queued
            try:
                frames = spooled_frames(message, arrays, self.path.parent)
            except StorageError as error:
                assert isinstance(message, OutputMade), "no other message has arrays so large that they lie in a file"
                logger.error("%s: %s", error, error.__cause__)
                frames = spooled_frames(Failed(message.request_id, error.code, str(error)), (), self.path.parent)
            socket.send_multipart(frames, copy=len(arrays) == 0)
        return True

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            first, *others = socket.recv_multipart()
            self._incoming.put((_TO_WORKER.decode(first), others))

    def _beat(self) -> None:
        if os.getppid() != self._parent:
            os._exit(1)  # nobody is there to work for; an orphan would hold the device
        self._outgoing.put((self.heartbeat(), ()))
