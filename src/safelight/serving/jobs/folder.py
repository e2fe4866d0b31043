"""Files of jobs in one folder of this machine. Imports no torch."""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from safelight import media
from safelight.errors import StateDirectoryError
from safelight.serving import directories
from safelight.serving.jobs.files import Batch, Files
from safelight.serving.jobs.store import Kept

logger = logging.getLogger(__name__)

CLEANED = 500
"""Files of which a start asks the store at a time."""
_UNKNOWN = Kept(is_over=False)


class FolderBatch(Batch):
    """Files under temporary names, each synced, until they are renamed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temporaries: dict[str, Path] = {}

    def write(self, name: str, data: bytes) -> int:
        self._temporaries[name] = path = directories.temporary_path(self._directory)
        directories.write_private(path, data)
        return len(data)

    def make(self, name: str, into: Callable[[Path], None]) -> int:
        self._temporaries[name] = path = directories.temporary_path(self._directory, Path(name).suffix)
        into(path)
        directories.make_private(path)  # it is on the disk, and has the mode that the encoder gave it
        return path.stat().st_size

    def publish(self) -> None:
        for name, path in self._temporaries.items():
            path.replace(self._directory / name)
        media.sync(self._directory)

    def discard(self) -> None:
        _unlink([*self._temporaries.values(), *(self._directory / name for name in self._temporaries)])


class FolderFiles(Files):
    """Files of jobs in a directory, held by one server at a time."""

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
            raise directories.unusable("outputs directory", directory, error.strerror) from error
        self._lock = directories.hold("outputs directory", directory, directories.MARKER)
        super().__init__()

    def open(self, name: str) -> BinaryIO:
        return self.path(name).open("rb")

    def path(self, name: str) -> Path:
        """Return where a file of a job is."""
        assert name == Path(name).name and not name.startswith(".")
        return self.directory / name

    def check_writable(self) -> None:
        directories.probe(self.directory)

    async def clean(self, kept: Callable[[Collection[str]], Awaitable[Mapping[str, Kept]]]) -> None:
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

    async def close(self) -> None:
        await super().close()
        os.close(self._lock)

    def _batch(self) -> Batch:
        return FolderBatch(self.directory)

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

    def _remove(self, names: Iterable[str]) -> None:
        _unlink(map(self.path, names))

    def _remove_others(self, job_id: str, names: Collection[str]) -> None:
        others = [path for path in self.directory.iterdir() if directories.job_of(path.name) == job_id]
        _unlink(path for path in others if path.name not in names)


def _removed(path: Path, is_over: bool) -> bool:
    """Remove what a server of ours left unfinished, or what a job has no more that is over; say whether it is gone."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode) and directories.is_temporary_folder(path.name):
        inside = list(path.iterdir())
        if not all(directories.is_temporary(each.name) and stat.S_ISREG(each.lstat().st_mode) for each in inside):
            return False
        _unlink(inside)
        path.rmdir()
        return True
    if stat.S_ISREG(mode) and (directories.is_temporary(path.name) or is_over):
        path.unlink()
        return True
    return False


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
