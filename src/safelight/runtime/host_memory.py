"""What the host's memory has for this process: of the machine, its control groups and its own limits. Imports no torch.

It is read where Linux tells it, and nowhere else: what is not there bounds nothing.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNBOUNDED = 2**63
"""As much as there is: a group's limit of the first version is of this order where none is set."""
OWN_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
"""A process's own limits, each with the line of its status that says what counts against it."""


@dataclass(frozen=True)
class Kills:
    """How often the kernel has killed for lack of memory, since the machine, or the group, began.

    Attributes:
        of_group: in this process's control group.
        of_machine: anywhere.

    """

    of_group: int = 0
    of_machine: int = 0

    def since(self, before: Kills) -> str:
        """Say what the kernel has killed for since then; nothing where it has not."""
        if self.of_group > before.of_group:
            return "by the kernel, because the memory of its control group ran out"
        if self.of_machine > before.of_machine:
            return "by the kernel, because the machine's memory ran out"
        return ""


@dataclass(frozen=True)
class Dialect:
    """The names of one version of control groups.

    Attributes:
        limits: files of a group that each hold the most that it may take.
        used: what it takes.
        cached: lines of its `memory.stat` of what it would give back first: files, and what the kernel can make again.
        kills: the file with the number of processes that the kernel has killed in it.

    """

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]
    kills: str


SECOND = Dialect(
    limits=("memory.max", "memory.high"),
    used="memory.current",
    cached=("inactive_file", "active_file", "slab_reclaimable"),
    kills="memory.events",
)
FIRST = Dialect(
    limits=("memory.limit_in_bytes",),
    used="memory.usage_in_bytes",
    cached=("total_inactive_file", "total_active_file"),
    kills="memory.oom_control",
)


class HostMemory:
    """Reads it. All in bytes.

    Args:
        root: of the files that Linux tells by.
        limit_of: the limit of a resource of this process; negative for none.

    """

    def __init__(self, root: Path = Path("/"), limit_of: Callable[[int], int] | None = None) -> None:
        self._root = root
        self._proc = root / "proc"
        self._limit_of = limit_of or (lambda number: resource.getrlimit(number)[0])
        self._groups = list(self._find_groups())

    def free(self) -> int:
        """Return what this process can take now: the least of what the machine, its groups and its limits leave."""
        known = [_lines(self._proc / "meminfo").get("MemAvailable", UNBOUNDED)]
        for group, dialect in self._groups:
            limit = _limit(group, dialect)
            if limit < UNBOUNDED:
                statistics = _lines(group / "memory.stat")
                cached = sum(statistics.get(name, 0) for name in dialect.cached)
                known.append(limit - _number(group / dialect.used, 0) + cached)
        known += [limit - used for limit, used in self._own()]
        return max(0, min(known))

    def total(self) -> int:
        """Return what this process could take if nobody else took anything; 0 where nothing tells."""
        known = [_lines(self._proc / "meminfo").get("MemTotal", UNBOUNDED)]
        known += [_limit(group, dialect) for group, dialect in self._groups]
        known += [limit for limit, _ in self._own()]
        least = min(known)
        return 0 if least >= UNBOUNDED else least

    def own(self) -> int:
        """Return what this process has taken that no file would give back."""
        return _lines(self._proc / "self" / "status").get("RssAnon", 0)

    def kills(self) -> Kills:
        """Return how often the kernel has killed."""
        group = sum(_lines(group / dialect.kills).get("oom_kill", 0) for group, dialect in self._groups[:1])
        return Kills(group, _lines(self._proc / "vmstat").get("oom_kill", 0))

    def _own(self) -> Iterator[tuple[int, int]]:
        """Yield this process's own limits, each with what counts against it."""
        for number, line in OWN_LIMITS:
            limit = self._limit_of(number)
            if 0 <= limit < UNBOUNDED:
                yield limit, _lines(self._proc / "self" / "status").get(line, 0)

    def _find_groups(self) -> Iterator[tuple[Path, Dialect]]:
        """Yield the folders of this process's memory groups, the innermost first, and those that they are in."""
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            dialect = SECOND if not controllers else FIRST if "memory" in controllers.split(",") else None
            mount = None if dialect is None else self._mount(dialect)
            if mount is not None and dialect is not None:
                group = mount[0] / _below(path, mount[1])
                for folder in (group, *group.parents):
                    if (folder / dialect.used).exists() or (folder / dialect.limits[0]).exists():
                        yield folder, dialect
                    if folder == mount[0]:
                        break

    def _mount(self, dialect: Dialect) -> tuple[Path, str] | None:
        """Return where groups of a version are mounted, and which group is the root there."""
        for line in _text(self._proc / "self" / "mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(" "), after.split(" ")
            is_second = kind[0] == "cgroup2"
            is_first = kind[0] == "cgroup" and "memory" in kind[-1].split(",")
            if is_second if dialect is SECOND else is_first:
                return self._root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])
        return None


def _below(path: str, root: str) -> str:
    """Return a group's path as seen from the root of a mount; the root itself for one that lies outside."""
    pure = PurePosixPath(path)
    if ".." in pure.parts or not pure.is_relative_to(root):
        return ""
    return str(pure.relative_to(root))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _limit(group: Path, dialect: Dialect) -> int:
    return min(_number(group / name, UNBOUNDED) for name in dialect.limits)


def _number(path: Path, otherwise: int) -> int:
    """Return a file's one number; `otherwise` where there is none, as for `max`."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else otherwise


def _lines(path: Path) -> dict[str, int]:
    """Return a file's lines of a name and a number; kilobytes in bytes."""
    found = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", _text(path), re.MULTILINE)
    return {name: int(number) << (10 if unit else 0) for name, number, unit in found}


def _text(path: Path) -> str:
    """Return a file's text; nothing where it cannot be read: a group may be gone, or another's."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
