"""Messages over one ZeroMQ socket in a directory that only its owner may enter. Imports no torch.

A message on the wire is one frame of msgpack and a frame for each array beside it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from safelight.runtime.messages import Array, FromWorker, Heartbeat, ToWorker

HEARTBEAT_SECONDS = 0.1
_ENCODER = msgspec.msgpack.Encoder()
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)

Parcel = tuple[Any, Sequence[Array]]


def to_frames(message: ToWorker | FromWorker, arrays: Sequence[Array] = ()) -> list[bytes | memoryview]:
    """Return a message's frames; arrays are not copied."""
    return [_ENCODER.encode(message), *(np.ascontiguousarray(array).data.cast("B") for array in arrays)]


class ServerChannel:
    """The API process's end: listens on a socket file, for one worker.

    Args:
        path: of the socket; at most 100 bytes, in a directory of mode 0700.

    """

    def __init__(self, path: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(f"ipc://{path}")

    async def send(self, message: ToWorker, arrays: Sequence[Array] = ()) -> None:
        """Queue a message; the socket keeps what the worker has not taken yet."""
        await self._socket.send_multipart(to_frames(message, arrays), copy=len(arrays) == 0)

    async def receive(self) -> tuple[FromWorker, list[memoryview]]:
        """Wait for the next message, with its arrays' bytes."""
        first, *others = await self._socket.recv_multipart(copy=False)
        return _FROM_WORKER.decode(first.buffer), [frame.buffer for frame in others]

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
        self._context.term()


class WorkerChannel:
    """The worker's end: a thread that owns the socket, so that the heartbeat goes on while a unit runs.

    Args:
        path: of the socket.
        parent: process id of the supervisor: without it, the worker ends.
        heartbeat: makes the message that says that this process runs.

    """

    def __init__(self, path: str, parent: int, heartbeat: Callable[[], Heartbeat]) -> None:
        self._path = path
        self._heartbeat = heartbeat
        self._parent = parent
        self._incoming: queue.SimpleQueue[tuple[ToWorker, list[bytes]]] = queue.SimpleQueue()
        self._outgoing: queue.SimpleQueue[list[bytes | memoryview] | None] = queue.SimpleQueue()
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
        self._put(to_frames(message, arrays))

    def close(self) -> None:
        """Send what is queued, and end the thread."""
        self._put(None)
        self._thread.join(timeout=5)

    def _put(self, frames: list[bytes | memoryview] | None) -> None:
        self._outgoing.put(frames)
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.setsockopt(zmq.LINGER, 2000)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(f"ipc://{self._path}")
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake_read, zmq.POLLIN)
            beat = time.monotonic()
            while self._send_queued(socket):
                ready = dict(poller.poll(timeout=max(0, int(1000 * (beat - time.monotonic())))))
                if self._wake_read in ready:
                    os.read(self._wake_read, 65536)
                if socket in ready:
                    self._receive(socket)
                if time.monotonic() >= beat:
                    self._beat(socket)
                    beat = time.monotonic() + HEARTBEAT_SECONDS

    def _send_queued(self, socket: zmq.Socket[bytes]) -> bool:
        """Send what is queued; False when the channel was closed."""
        while True:
            try:
                frames = self._outgoing.get_nowait()
            except queue.Empty:
                return True
            if frames is None:
                return False
            socket.send_multipart(frames, copy=len(frames) == 1)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            first, *others = socket.recv_multipart()
            self._incoming.put((_TO_WORKER.decode(first), others))

    def _beat(self, socket: zmq.Socket[bytes]) -> None:
        if os.getppid() != self._parent:
            os._exit(1)  # nobody is there to work for; an orphan would hold the device
        socket.send_multipart(to_frames(self._heartbeat()))
