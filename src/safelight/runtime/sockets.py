"""Where the sockets of workers lie, and under which names they are reached. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

import zmq
import zmq.asyncio

from safelight.errors import PortError

DESCRIPTORS = "/proc/self/fd"
"""Where a process finds the folders that it holds open, on Linux."""


ROOM = 32
"""Descriptors that must be free when the library starts: it aborts the process where it gets none for its threads."""
MAX_RETIRED = 8
_FOLDER = re.compile(r"safelight-[a-z0-9_]{8}")
_FILE = re.compile(r"[0-9]+\.(?:unit|store|[0-9]+\.ipc)|[0-9a-f]{16}\.frames")
_HELD: dict[Path, int] = {}
"""The folders that this process has made, held by a lock that ends with it."""


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
        _remove_left(Path(tempfile.gettempdir()))
        folder = Path(tempfile.mkdtemp(prefix="safelight-"))
        _HELD[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(_HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder
    except OSError as error:
        reason = error.strerror or error
        raise PortError(
            f"TMPDIR: no folder for sockets can be made ({reason}); name one that can be written"
        ) from error


def require_private(folder: Path) -> None:
    """Refuse a folder of sockets in whose place something else has come since it was made, which others may look into.

    Who cleans temporary files may remove it, and whoever is first makes another one of its name.

    Raises:
        OSError: if it is not there, is a link, or is not for this user alone.

    """
    found = folder.lstat()
    if found.st_mode != stat.S_IFDIR | 0o700 or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "another took the place of the folder that was made")


def remove_folder(folder: Path) -> None:
    """Remove a folder that was made, with all that is in it, and let go of it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _HELD:
        os.close(_HELD.pop(folder))


def _remove_left(parent: Path) -> None:
    """Remove the folders of servers that were killed: of this user, of our form, and held by no process."""
    with suppress(OSError), os.scandir(parent) as entries:
        left = [Path(entry.path) for entry in entries if _FOLDER.fullmatch(entry.name)]
        for path in left:
            with suppress(OSError):  # another server removes it, or it is not ours to remove
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    names = _left_files(descriptor)
                    for name in names:
                        os.unlink(name, dir_fd=descriptor)
                    if names:
                        path.rmdir()
                finally:
                    os.close(descriptor)


def _left_files(folder: int) -> list[str]:
    """Return the names in a folder of a server that is no more; none where it is no such folder.

    Raises:
        OSError: if it is held.

    """
    found = os.fstat(folder)
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        return []
    if not names or not all(_FILE.fullmatch(name) for name in names):  # an empty one may be new, and not held yet
        return []
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return names


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
