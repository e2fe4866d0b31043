"""Where the sockets of workers lie, and under which names they are reached. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import zmq

from safelight.errors import PortError

DESCRIPTORS = "/proc/self/fd"
"""Where a process finds the folders that it holds open, on Linux."""


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
