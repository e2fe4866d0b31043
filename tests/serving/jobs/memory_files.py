"""Files of jobs in memory: a second implementation of `Files`, which holds that to what it promises."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from safelight.serving.directories import job_of
from safelight.serving.jobs.files import Batch, Files
from safelight.serving.jobs.store import Kept


class MemoryBatch(Batch):
    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._written: dict[str, bytes] = {}

    def write(self, name: str, data: bytes) -> int:
        self._written[name] = bytes(data)
        return len(data)

    def make(self, name: str, into: Callable[[Path], None]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            into(path)
            return self.write(name, path.read_bytes())

    def publish(self) -> None:
        self._files.update(self._written)

    def discard(self) -> None:
        for name in self._written:
            self._files.pop(name, None)


class MemoryFiles(Files):
    """Files by name in a dict, which may be given, as another server's."""

    def __init__(self, directory: Path, files: dict[str, bytes] | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.files = {} if files is None else files

    def open(self, name: str) -> BinaryIO:
        if name not in self.files:
            raise FileNotFoundError(name)
        return io.BytesIO(self.files[name])

    def check_writable(self) -> None:
        pass

    async def clean(self, kept: Callable[[Collection[str]], Awaitable[Mapping[str, Kept]]]) -> None:
        jobs = {name: job_of(name) or "" for name in self.files}
        known = await kept(frozenset(jobs.values()) - {""})
        for name, job in jobs.items():
            if job in known and known[job].is_over and name not in known[job].names:
                del self.files[name]

    def _batch(self) -> Batch:
        return MemoryBatch(self.files)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.files.pop(name, None)

    def _remove_others(self, job_id: str, names: Collection[str]) -> None:
        self._remove([name for name in self.files if job_of(name) == job_id and name not in names])
