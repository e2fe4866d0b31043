"""Where the sockets of workers lie, and under which names they are reached. Imports no torch."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from pathlib import Path

import zmq
import zmq.asyncio

from safelight.errors import PortError

DESCRIPTORS = "/proc/self/fd"
"""Where a process finds the folders that it holds open, on Linux."""


ROOM = 32
"""Descriptors that must be free when the library starts: it aborts the process where it gets none for its threads."""
MAX_RETIRED = 8


class _Library:
    """The library's threads, for as long as anybody holds them: they are started once, while there is room.

    A socket for a further worker then needs a descriptor or two, and is refused where there is none, in words.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.asyncio.Context | None = None
        self._num_holders = 0
        self._retired: deque[SocketName] = deque()

    def hold(self) -> zmq.asyncio.Context:
        """Return the context, started.

        Raises:
            PortError: if there are too few descriptors.

        """
        with self._lock:
            if self._context is None:
                check_room()
                self._context = zmq.asyncio.Context()
                zmq.Socket(self._context, zmq.PAIR).close(linger=0)  # it starts its threads with its first socket
            self._num_holders += 1
            return self._context

    def let_go(self, name: SocketName | None = None) -> None:
        """End a hold, of whoever used a socket by this name: the library deletes the file in its own time."""
        with self._lock:
            self._num_holders -= 1
            if name is not None:
                self._retired.append(name)
            if self._num_holders == 0 and self._context is not None:
                self._context.term()
                self._context = None
            while self._retired and (self._context is None or len(self._retired) > MAX_RETIRED):
                self._retired.popleft().close()


def check_room() -> None:
    """Refuse to go on where this process can open few files more.

    Raises:
        PortError: saying so.

    """
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(ROOM))
    except OSError as error:
        reason = error.strerror or error
        raise PortError(f"sockets: too few files can be opened ({reason}); raise the limit (ulimit -n)") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def make_folder() -> Path:
    """Make a folder of mode 0700 for sockets and what goes through files, where the system has temporary files.

    Raises:
        PortError: if none can be made.

    """
    try:
        return Path(tempfile.mkdtemp(prefix="safelight-"))
    except OSError as error:
        reason = error.strerror or error
        raise PortError(
            f"TMPDIR: no folder for sockets can be made ({reason}); name one that can be written"
        ) from error


class SocketName:
    """The name of a socket file for the library: its path, or a way to it that is short enough to be a socket's name.

    The system takes some hundred bytes and the library takes text, and folders of temporary files may have other names.
    Then the name goes through the folder, held open, so that the socket lies in it all the same.

    Args:
        path: of the socket.

    Raises:
        PortError: if the folder cannot be opened, or there is no short way.

    """

    def __init__(self, path: Path) -> None:
        self._folder: int | None = None
        name, given = str(path), os.fsencode(path)
        if len(given) > zmq.IPC_PATH_MAX_LEN or given.decode(errors="replace").encode() != given:
            if not Path(DESCRIPTORS).is_dir():
                takes = f"a folder whose name is text, and {max(0, len(given) - zmq.IPC_PATH_MAX_LEN)} bytes shorter"
                raise PortError(f"TMPDIR: {str(path)!r} cannot be a socket's name; it takes {takes}")
            try:
                self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise PortError(f"TMPDIR: {str(path.parent)!r} cannot be opened: {error.strerror}") from error
            name = f"{DESCRIPTORS}/{self._folder}/{path.name}"
        self.address = f"ipc://{name}"

    def close(self) -> None:
        """Let go of the folder, once the socket is closed."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


LIBRARY = _Library()
"""One in a process, whose supervisors share it."""
