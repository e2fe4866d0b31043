"""What Linux tells of memory, from files of a folder: both versions of control groups, and a process's own limits."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from safelight.runtime.host_memory import HostMemory, Kills

GIB = 1 << 30
V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"
MOUNTS = {
    "v1": f"35 31 0:32 {{root}} {V1} rw,relatime shared:9 - cgroup cgroup rw,memory\n",
    "v2": f"30 23 0:26 {{root}} {V2} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
}
GROUPS = {"v1": "9:name=systemd:/\n4:cpu,memory:{path}\n0::/\n", "v2": "0::{path}\n"}
UNSET = {"v1": str(2**63 - 4096), "v2": "max"}


def names(version):
    return ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == "v1" else ("memory.max", "memory.current")


@pytest.fixture
def machine(tmp_path):
    """Return a function that writes the files of a machine of 16 GiB, 10 of which are available."""

    def write(version, path="/", root="/", **groups):
        files = {
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1024 kB\nMemAvailable:   10485760 kB\n",
            "proc/vmstat": "nr_free_pages 7\noom_kill 3\n",
            "proc/self/status": "Name:\tpython\nVmSize:\t 2097152 kB\nRssAnon:\t 1048576 kB\nVmData:\t 1048576 kB\n",
        }
        if version:
            files["proc/self/cgroup"] = GROUPS[version].format(path=path)
            files["proc/self/mountinfo"] = "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + MOUNTS[version].format(root=root)
        for name, text in files.items():
            place(tmp_path / name, text)
        return HostMemory(tmp_path, lambda number: -1)

    def group(version, path, limit=None, used=0, cached=0, kills=0, high=None):
        folder = tmp_path / (V1 if version == "v1" else V2).lstrip("/") / path.strip("/")
        most, current = names(version)
        prefix = "total_" if version == "v1" else ""
        statistics = f"anon 5\n{prefix}inactive_file {cached}\n{prefix}active_file {cached}\nfile_mapped 999999999999\n"
        place(folder / most, f"{UNSET[version] if limit is None else limit}\n")
        place(folder / current, f"{used}\n")
        place(folder / "memory.stat", statistics)
        place(folder / ("memory.oom_control" if version == "v1" else "memory.events"), f"oom 9\noom_kill {kills}\n")
        if high is not None:
            place(folder / "memory.high", f"{high}\n")

    machine: Any = write
    machine.group = group
    return machine


def place(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_groups_it_is_the_machines(machine):
    memory = machine("")
    assert (memory.free(), memory.total(), memory.own()) == (10 * GIB, 16 * GIB, GIB)
    assert memory.kills() == Kills(0, 3)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("path", ["/", "/a", "/a/b with space/c"])
def test_a_groups_limit_less_what_it_uses_and_would_not_give_back(machine, version, path):
    machine.group(version, path, limit=4 * GIB, used=3 * GIB, cached=GIB // 4, kills=2)
    memory = machine(version, path)
    assert memory.free() == GIB + GIB // 2
    assert memory.total() == 4 * GIB
    assert memory.kills() == Kills(2, 3)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bound", ["", "/a", "/a/b"])
def test_the_tightest_group_counts_whichever_it_is(machine, version, bound):
    for path in ("", "/a", "/a/b"):
        machine.group(version, path, limit=2 * GIB if path == bound else 8 * GIB, used=GIB)
    memory = machine(version, "/a/b")
    assert memory.free() == GIB and memory.total() == 2 * GIB


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_group_without_a_limit_bounds_nothing(machine, version):
    machine.group(version, "/a", used=9 * GIB)
    memory = machine(version, "/a")
    assert memory.free() == 10 * GIB and memory.total() == 16 * GIB


def test_a_soft_limit_is_one_too(machine):
    machine.group("v2", "/a", limit=4 * GIB, high=2 * GIB, used=GIB)
    memory = machine("v2", "/a")
    assert memory.free() == GIB and memory.total() == 2 * GIB


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/docker/1", "/docker/1", ""),
        ("/docker/1/x", "/docker/1", "x"),
        ("/../..", "/", ""),
        ("/host/9", "/docker/1", ""),
    ],
)
def test_a_containers_mount_begins_at_its_own_group(machine, version, path, root, below):
    machine.group(version, below, limit=3 * GIB, used=2 * GIB)
    assert machine(version, path, root).free() == GIB


def test_more_used_than_may_be_is_nothing_free(machine):
    machine.group("v2", "/a", limit=GIB, used=2 * GIB)
    assert machine("v2", "/a").free() == 0


@pytest.mark.parametrize(("number", "used"), [(resource.RLIMIT_AS, 2 * GIB), (resource.RLIMIT_DATA, GIB)])
def test_the_processs_own_limits_count(machine, tmp_path, number, used):
    machine("")
    memory = HostMemory(tmp_path, lambda asked: 3 * GIB if asked == number else -1)
    assert memory.free() == 3 * GIB - used and memory.total() == 3 * GIB


def test_what_cannot_be_read_bounds_nothing(tmp_path):
    memory = HostMemory(tmp_path, lambda number: -1)
    assert memory.total() == 0 and memory.free() > 2**60 and memory.kills() == Kills()


def test_this_machine_tells(machine):
    memory = HostMemory()
    assert 0 < memory.free() <= memory.total() and memory.own() > 0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (Kills(0, 3), Kills(0, 3), ""),
        (Kills(0, 3), Kills(1, 4), "control group"),
        (Kills(2, 3), Kills(2, 4), "machine"),
    ],
)
def test_what_the_kernel_killed_for_is_told(before, after, words):
    told = after.since(before)
    assert words in told and bool(told) == bool(words)
