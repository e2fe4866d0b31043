"""Which directories are ours, and which files in them are of our making. Imports no torch.

As `initdb` does: a directory that is neither empty nor ours is refused, whatever it is named in a setting. What we make
is marked by a file; what an older version made is known by the names in it. Nothing is removed by its place alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from safelight import media
from safelight.errors import StateDirectoryError, shown

MARKER = ".safelight"
MARKED = b"A directory of a Safelight server, which keeps files here and removes its own. Version 1.\n"
_MARKS = MARKED.partition(b",")[0]
"""With which every version's mark begins; another file, or a folder, of that name is somebody's."""
TEMPORARY = ".tmp-"
"""What begins so, or with a dot at all, is nobody's file."""
PRIVATE = 0o600
MAX_NAMED = 10
"""Files that a message names at most; it counts the others."""
_OF_THE_DISK = frozenset({"lost+found"})
"""What an empty disk has, where one is mounted as a directory of ours."""
_OUTPUT_FILE = r"(?:attempt[0-9]\.)?[0-9]{1,4}(?:\.[a-z0-9]{3,11}){1,3}"
_JOB_FILE = re.compile(rf"((?:image|video)_[0-9a-f]{{32}})\.(?:input[0-9]{{1,4}}|{_OUTPUT_FILE})")
_TEMPORARY_FILE = re.compile(r"\.tmp-[0-9a-f]{16}(?:\.(?:mp4|wav))?")
_VIDEO_FOLDER = re.compile(r"\.safelight-[a-z0-9_]{8}")
"""In which a video is written, under the temporary name that it gets when it is whole."""


def job_of(name: str) -> str | None:
    """Return the id of the job whose file has such a name; None for a name of another form."""
    match = _JOB_FILE.fullmatch(name)
    return None if match is None else match[1]


def is_temporary(name: str) -> bool:
    """Say whether a file of such a name was never finished by a server of ours."""
    return _TEMPORARY_FILE.fullmatch(name) is not None


def is_temporary_folder(name: str) -> bool:
    """Say whether a folder of such a name is one in which a server of ours wrote a video."""
    return _VIDEO_FOLDER.fullmatch(name) is not None


def are_outputs(names: frozenset[str]) -> bool:
    """Say whether an older version made a directory of outputs with such names in it."""
    leftovers = all(is_temporary(name) or is_temporary_folder(name) for name in names)
    return leftovers or any(job_of(name) is not None for name in names)


def check_ours(what: str, directory: Path, is_older: Callable[[frozenset[str]], bool]) -> None:
    """Make a directory where there is none, and refuse one that is neither empty nor ours. This waits for the disk.

    Args:
        what: the directory is, for the message.
        directory: that is to be used.
        is_older: whether such names are those of a directory that an older version made, which marked none.

    Raises:
        StateDirectoryError: if it is somebody's, or cannot be made or read.

    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = frozenset(path.name for path in directory.iterdir()) - _OF_THE_DISK
    except OSError as error:
        raise unusable(what, directory, error.strerror) from error
    if names and not is_marked(directory) and not is_older(names):
        problem = f"it is neither empty nor Safelight's, it holds {listed(names)}; name another folder"
        raise unusable(what, directory, problem)


def unusable(what: str, directory: Path, why: object) -> StateDirectoryError:
    """Return the error for a directory that cannot be used; `what` it is."""
    return StateDirectoryError(f"{what} {str(directory)!r} cannot be used: {why}")


def is_marked(directory: Path) -> bool:
    """Say whether a directory has our mark: a file of ours, whatever else of its name others have."""
    path = directory / MARKER
    with suppress(FileNotFoundError):
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                return file.read(len(_MARKS)) == _MARKS
    return False


def mark(directory: Path) -> None:
    """Mark a directory as ours, durably and at once; `OSError` says why that is not possible."""
    if is_marked(directory):
        return
    path, temporary = directory / MARKER, temporary_path(directory)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, f"{MARKER} is another program's")
    write_private(temporary, MARKED)
    temporary.replace(path)
    media.sync(directory)


def temporary_path(directory: Path, ending: str = "") -> Path:
    """Return a name in a directory that nobody has, for a file that is not finished."""
    return directory / f"{TEMPORARY}{secrets.token_hex(8)}{ending}"


def hold(what: str, directory: Path, name: str) -> int:
    """Take a directory for this process, for as long as the returned descriptor is open.

    Args:
        what: the directory is, for the message.
        directory: that is taken.
        name: of the file in it that is locked, and made where there is none.

    Raises:
        StateDirectoryError: if another server holds it, or it cannot be opened.

    """
    try:
        descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    except OSError as error:
        raise unusable(what, directory, error.strerror) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateDirectoryError(f"{what} {str(directory)!r} is held by another server; give each its own") from error
    return descriptor


def write_private(path: Path, data: bytes) -> None:
    """Write and sync a new file that its owner alone may read; if that fails, it does not stay."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):  # the disk fails: the next start removes it
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def probe(directory: Path) -> None:
    """Write and sync a file without a name, which is gone when it is closed; `OSError` says why that cannot be."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        file.write(bytes(4096))
        os.fsync(file.fileno())


def make_private(path: Path) -> None:
    """Let nobody but its owner read a file, as an older version did; what is no file, or not there, stays so."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            path.chmod(PRIVATE)


def listed(names: Iterable[str]) -> str:
    """Return some of the names and how many others there are, as a message or a log may show them."""
    every = sorted(names)
    others = f" and {len(every) - MAX_NAMED} more" if len(every) > MAX_NAMED else ""
    return ", ".join(shown(name) for name in every[:MAX_NAMED]) + others
