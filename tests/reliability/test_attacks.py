"""`make test-attacks`: it measures what it says, and a server that is broken fails a row."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from safelight.runtime.client import Progress
from safelight.serving import jobs_api
from safelight.serving.http import listening
from safelight.serving.jobs.run import JobEvent
from tests import live_server
from tests.live_server import fault_model, serving
from tests.reliability import attacks
from tests.reliability.attack_processes import ATTACKS
from tests.reliability.attack_rows import Range, Row, at_any_time, judged, quantile

BROKEN = """
import os, sys, time
from safelight.cli.main import main
from safelight.serving.http import hosts

kept, whole = [], hosts.Hosts.is_foreign

def broken(self, headers):
    if "evil" in headers.get("host", ""):
        if not kept:
            kept.append(b"x" * 400_000_000)
            kept.append(open(os.devnull))
            open(os.path.join(os.environ["TMPDIR"], "left"), "w").close()
        time.sleep(0.15)
    return whole(self, headers)

hosts.Hosts.is_foreign = broken
main(sys.argv[1:])
"""
GOOD = Row("other sites", "it", 0.001, 0.099, 0.5, 0.0, 0.05, 100, 0, 299_000_000, 0, 99_000_000, answers={"403": 200})


def test_a_server_passes(tmp_path):
    """Two cheap attacks, by the code that the command runs."""
    with serving(tmp_path, fault_model(tmp_path / "model", step_seconds=0.002)) as server:
        here = Range(server)
        attacks = {name: dataclasses.replace(ATTACKS[name], shows={}) for name in ("nothing", "ranges")}
        rows = [here.measure(name, 0.7, attack, is_busy=True) for name, attack in attacks.items()]
    for row in rows:
        assert row.faults == []
        assert row.asked > 5
        assert row.served == len(row.visits) > 0
    assert rows[1].answers["400"] > 0


def test_a_broken_server_fails(tmp_path, monkeypatch):
    """One whose handler stops the event loop for 150 ms, and that keeps memory, a descriptor and a file."""

    real = live_server.command
    monkeypatch.setattr("tests.reliability.attack_rows.SETTLING_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(live_server, "command", lambda *arguments: [*real(*arguments)[:2], "-c", BROKEN, *arguments])
        with serving(tmp_path, fault_model(tmp_path / "model", step_seconds=0.002)) as server:
            row = Range(server).measure("other sites", 0.7)
    said = "\n".join(row.faults)
    for fault in (
        r"p99 is \d{3,} ms",
        r"takes 4\d\d MB",
        r"keeps 4\d\d MB",
        "1 descriptors are left",
        "files are left: left",
    ):
        assert re.search(fault, said), (fault, said)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"p99": 0.101}, "p99 is 101 ms"),
        ({"unanswered": 1}, "1 of 100 questions"),
        ({"api": 301_000_000}, "takes 301 MB"),
        ({"left": 101_000_000}, "keeps 101 MB"),
        ({"visits": [("200", 0.1), ("429", 0.1)]}, "1 of 2 times"),
        ({"answers": {"403": 200, "500": 1}}, "answers of 500"),
        ({"answers": {"403": 1}}, "no attack"),
    ],
)
def test_every_bound_is_judged(changes, fault):
    found = judged(dataclasses.replace(GOOD, **changes), ATTACKS["other sites"])
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0])


def test_a_stall_is_as_many_late_answers_as_questions_it_held_up():
    """A second in ten is a tenth of all who ask, and not one question of many."""
    took = [0.001] * 1800 + [1.0]
    assert quantile(sorted(took), 0.99) == 0.001
    assert quantile(at_any_time(took, 0.005), 0.99) > 0.8


def test_the_table_is_written_in_its_place():
    text = f"# A\n{attacks.BEGIN}old\n{attacks.END}# B\n"
    missed = dataclasses.replace(GOOD, p99=0.2, faults=["x"])
    once = attacks.rewritten(text, attacks.table([GOOD, missed], 6.0))
    assert once.startswith("# A\n")
    assert once.endswith("# B\n")
    assert "old" not in once
    assert "| it | 1.0 | 99.0 |" in once
    assert "| **it** | 1.0 | **200.0** |" in once
    assert attacks.rewritten(once, attacks.table([GOOD, missed], 6.0)) == once
    with pytest.raises(SystemExit):
        attacks.rewritten("# A\n", "x")


def test_connections_are_given_out_a_few_at_a_time():
    """However many wait, and whether they may be open or not: asyncio takes them until there are none."""
    with listening.Listener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(200)
        listener.setblocking(False)
        waiting = [socket.create_connection(listener.getsockname(), timeout=5) for _ in range(100)]
        given: list[int] = []
        taken = []
        while sum(given) < 100:
            given.append(0)
            try:
                while True:
                    taken.append(listener.accept()[0])
                    given[-1] += 1
            except BlockingIOError:
                assert given[-1] <= listening.GIVEN_AT_ONCE
        for sock in (*waiting, *taken):
            sock.close()


def test_streams_that_wake_at_once_write_one_after_another(monkeypatch):
    """All that follow a job wake when it takes a step: between two of them others have their turn."""
    turn, written = [0], list[int]()
    monkeypatch.setattr(jobs_api, "job_object", lambda job, context, request: written.append(turn[0]))

    async def follow() -> None:
        stepped = asyncio.Event()

        class Events:
            async def follow(self, job_id: str) -> AsyncIterator[JobEvent]:
                await stepped.wait()
                yield JobEvent("step", job, Progress(num_outputs=1))

        context: Any = SimpleNamespace(jobs=SimpleNamespace(events=Events()), event_turn=asyncio.Lock())
        following = [asyncio.ensure_future(anext(jobs_api._events(context, request, job))) for _ in range(100)]
        await asyncio.sleep(0)
        stepped.set()
        while not all(each.done() for each in following):
            turn[0] += 1
            await asyncio.sleep(0)

    job: Any = SimpleNamespace(id="image_1")
    request: Any = None
    asyncio.run(follow())
    assert len(written) == 100
    assert max(Counter(written).values()) <= 2
