"""Where the files of jobs are kept: they appear whole, or not at all. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, TypeVarTuple

from safelight.errors import OutputError, SafelightError, StorageError
from safelight.serving.http.spool import Stored
from safelight.serving.jobs.store import Kept

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NUM_THREADS = 2
"""Pictures and videos that are encoded, and files that are written, at a time."""


class Batch(Protocol):
    """Files that will appear together. Its methods wait for the disk, and are for one thread at a time."""

    def write(self, name: str, data: bytes) -> int:
        """Write a file, durably and without its name, and return its size."""

    def make(self, name: str, into: Callable[[Path], None]) -> int:
        """Keep the file that is made at a path of this machine, likewise."""

    def publish(self) -> None:
        """Give all files their names, durably; if that fails, the batch is discarded."""

    def discard(self) -> None:
        """Remove what was written, if it has names too."""


class Files(ABC):
    """Files of jobs, by name, written by a pool of threads and never in the event loop.

    What its methods raise of a disk is a `StorageError` whose message holds no path. Names come from jobs, never from a
    client.

    Attributes:
        directory: a folder of this machine for what waits on disk meanwhile, and has no name.

    """

    directory: Path

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="safelight-media")

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run work of encoding or decoding in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def save(self, files: Mapping[str, bytes | Stored]) -> None:
        """Write files by name, durably.

        Raises:
            StorageError: if there is no room, or the disk fails; none of them is there then.

        """

        def write(batch: Batch) -> None:
            for name, data in files.items():
                batch.write(name, data if isinstance(data, bytes) else data.read())
            batch.publish()

        await self.stage(write)

    async def stage(self, write: Callable[[Batch], T]) -> tuple[Batch, T]:
        """Let `write` write files without their names, in a thread, and return them and what it says of them.

        Raises:
            StorageError: if there is no room, or the disk fails; nothing is left then.
            SafelightError: if they cannot be encoded; likewise.

        """
        batch = self._batch()
        return batch, await self.run(_whole, batch, write, batch)

    async def publish(self, batch: Batch) -> None:
        """Give staged files their names, durably.

        Raises:
            StorageError: if there is no room, or the disk fails; nothing is left then.

        """
        await self.run(_whole, batch, batch.publish)

    async def discard(self, batch: Batch) -> None:
        """Remove staged files that will not be published."""
        await self.run(_named, batch.discard)

    async def remove(self, names: Iterable[str]) -> None:
        """Remove files by name; one that is not there is none."""
        await self.run(_named, self._remove, list(names))

    async def remove_others(self, job_id: str, names: Iterable[str]) -> None:
        """Remove a job's files but for those of these names: what an attempt has left that was not finished."""
        await self.run(_named, self._remove_others, job_id, frozenset(names))

    async def read(self, name: str) -> bytes:
        """Return a file.

        Raises:
            StorageError: if it cannot be read.

        """
        return await self.run(_named, self._read, name)

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file to be read from anywhere in it; this waits for the disk. Its `OSError` is the disk's.

        Raises:
            FileNotFoundError: if there is none.

        """

    @abstractmethod
    def check_writable(self) -> None:
        """Do nothing where a file could be written; `OSError` says why it could not be. This waits for the disk."""

    @abstractmethod
    async def clean(self, kept: Callable[[Collection[str]], Awaitable[Mapping[str, Kept]]]) -> None:
        """Remove what a server left that died, and nothing else; name what is left over. Only before any are written.

        Removed are files without names, and files of jobs that are over and do not have them.

        Args:
            kept: says what is known of jobs by their ids, of which it is given some at a time.

        Raises:
            StateDirectoryError: if that cannot be done.

        """

    async def close(self) -> None:
        """Wait for what is being encoded and written at this moment, and end the threads."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    @abstractmethod
    def _batch(self) -> Batch:
        """Return a batch without files."""

    @abstractmethod
    def _remove(self, names: Iterable[str]) -> None: ...

    @abstractmethod
    def _remove_others(self, job_id: str, names: Collection[str]) -> None: ...

    def _read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()


def _whole(batch: Batch, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Do something with a batch, of which nothing is left if that fails."""
    try:
        return _named(function, *args)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk fails: the next start removes them
            batch.discard()
        raise


def _named(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Do something with the disk, whose failure becomes an error with a message that holds no path."""
    try:
        return function(*args)
    except (OSError, OutputError) as error:
        reason = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(reason, OSError):
            raise SafelightError("the output could not be written") from error
        raise StorageError.of(reason, "the outputs") from error
