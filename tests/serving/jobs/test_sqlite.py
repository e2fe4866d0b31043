"""The job store: one state machine, durable at every commit, for one server at a time."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safelight.errors import ConflictError, InvalidParameterError, StateDirectoryError, StorageFullError
from safelight.serving.clocks import Clocks, Moment
from safelight.serving.jobs.job import (
    MAX_ATTEMPTS,
    Job,
    JobError,
    StoredFile,
    StoredOutput,
    new_id,
)
from safelight.serving.jobs.sqlite import SqliteJobStore
from safelight.serving.jobs.store import Horizon
from safelight.serving.principals import owner_of
from tests.serving.disks import as_left_by_a_death, fill, make_read_only, small_disk
from tests.serving.job_server import Clock, file_names, serving, unfinished


def make_job(kind="image", **fields) -> Job:
    given = {"id": new_id(kind), "model": "stub", "params": {"prompt": "a", "seed": 1}, "created_at": 1.0, **fields}
    return Job(kind=kind, **given)


def an_output(job: Job, size: int = 10) -> StoredOutput:
    return StoredOutput(f"{job.id}.0.png", "image/png", 8, 8, size, seed=1)


def completed(job: Job, at: float = 2.0, size: int = 10) -> Job:
    return ended(job.completed([an_output(job, size)], [], {}), at)


def failed(job: Job, at: float = 2.0) -> Job:
    return ended(job.failed(JobError("cancelled", "why")), at)


def ended(job: Job, at: float) -> Job:
    return msgspec.structs.replace(job, completed_at=at, expires_at=at + 10)


async def add_in(store: SqliteJobStore, job: Job, state: str) -> Job:
    """Bring a new job into a state, step by step."""
    begun: Any = Job.begun
    steps = {"queued": [], "in_progress": [begun], "completed": [begun, completed], "failed": [failed]}[state]
    await store.add(job)
    for step in steps:
        old, job = job, step(job, 2.0)
        assert await store.replace(old, job)
    return job


def with_store(folder: Path, use):
    async def main():
        store = SqliteJobStore(folder)
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(main())


def test_a_job_comes_back_whole_after_a_restart(tmp_path):
    job = make_job(
        "video",
        params={"prompt": "x\u00fc\U0001f600\u2028", "seed": 2**64 - 1, "sigmas": [0.1, 1 / 3], "n": 1},
        request={"size": "48x32", "seconds": "2", "quality": "low"},
        output_format="mp4",
        compression=None,
        owner=owner_of("a key"),
        idempotency_key="k",
        digest="d",
        inputs=(StoredFile("f.input0", 7, "image"),),
        warnings=("careful",),
    )
    extra = {"thumbnail": StoredFile("t", 3)}
    output = StoredOutput("o", "video/mp4", 48, 32, 99, 2**64 - 1, 9, 8, extra)

    async def write(store):
        assert await store.add(job) is job
        begun = job.begun(5.0)
        assert await store.replace(job, begun)
        done = ended(begun.completed([output], ["careful", "more"], {"denoising": 1 / 3}), 6.0)
        assert await store.replace(begun, done)
        return done

    done = with_store(tmp_path, write)
    assert done.warnings == ("careful", "more") and done.num_bytes == 7 + 99 + 3 + len(msgspec.json.encode(done))
    assert done.attempts == 1
    assert with_store(tmp_path, lambda store: store.get(job.id)) == done


STATES = ("queued", "in_progress", "completed", "failed")
LEGAL = {("queued", "in_progress"), ("in_progress", "in_progress"), ("in_progress", "completed")} | {
    (old, "failed") for old in ("queued", "in_progress")
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(STATES, STATES)))
def test_every_step_is_legal_or_refused(tmp_path, old, new):
    async def use(store):
        job = await add_in(store, make_job(), old)
        nexts: dict[str, Any] = {"in_progress": Job.begun, "completed": completed, "failed": failed}
        after = nexts[new](job, 3.0) if new in nexts else msgspec.structs.replace(job, state="queued")
        assert await store.replace(job, after) == ((old, new) in LEGAL)
        assert await store.get(job.id) == (after if (old, new) in LEGAL else job)

    with_store(tmp_path, use)


def test_a_third_attempt_is_refused(tmp_path):
    async def use(store):
        job = await add_in(store, make_job(), "in_progress")
        second = job.begun(3.0)
        assert await store.replace(job, second) and second.attempts == MAX_ATTEMPTS == 2
        assert not await store.replace(second, second.begun(4.0))
        assert second.started_at == 2.0  # when its first began

    with_store(tmp_path, use)


def test_whoever_comes_second_is_refused(tmp_path):
    async def use(store):
        queued = await add_in(store, make_job(), "queued")
        begun = queued.begun(1.0)
        assert await store.replace(queued, begun)
        assert not await store.replace(queued, failed(queued)), "from a form that is not there any more"
        ends = [completed(begun, at) for at in (2.0, 3.0)] + [failed(begun)]
        won = await asyncio.gather(*(store.replace(begun, end) for end in ends))
        assert won == [True, False, False]
        assert await store.get(queued.id) == ends[0]
        second = begun.begun(2.0)  # the same state, another attempt
        assert not await store.replace(second, completed(second))

        deleted = await add_in(store, make_job(), "in_progress")
        assert await store.delete(deleted.id) == deleted
        assert await store.delete(deleted.id) is None
        assert not await store.replace(deleted, completed(deleted))
        assert await store.get(deleted.id) is None

    with_store(tmp_path, use)


def test_one_idempotency_key_is_one_job(tmp_path):
    async def use(store):
        jobs = [make_job(idempotency_key="k", digest="d") for _ in range(8)]
        accepted = await asyncio.gather(*map(store.add, jobs))
        assert {job.id for job in accepted} == {jobs[0].id}
        with pytest.raises(ConflictError) as error:
            await store.add(make_job(idempotency_key="k", digest="other"))
        assert error.value.status == 409 and error.value.code == "idempotency_conflict"
        other = make_job(idempotency_key="k", digest="other", owner="someone")
        assert await store.add(other) is other
        assert await store.find("someone", "k") == other and await store.find("nobody", "k") is None
        await store.delete(jobs[0].id)
        assert await store.add(jobs[1]) is jobs[1]
        assert {(await store.add(make_job())).id for _ in range(2)}.isdisjoint({jobs[1].id}), "no key, no sameness"

    with_store(tmp_path, use)


def test_pages_lead_through_a_list_in_both_directions(tmp_path):
    async def use(store):
        jobs = [make_job("video" if i % 3 else "image", owner="me" if i % 2 else "") for i in range(12)]
        for job in jobs:
            await store.add(job)
        everything = [job.id for job in jobs]
        for order, expected in (("asc", everything), ("desc", everything[::-1])):
            found, after = [], None
            while True:
                page = await store.page(after=after, limit=5, order=order)
                found += [job.id for job in page.jobs]
                if not page.has_more:
                    break
                after = found[-1]
            assert found == expected
        mine = await store.page(kind="video", owner="me", limit=100)
        assert [job.id for job in mine.jobs] == [j.id for j in jobs[::-1] if j.kind == "video" and j.owner == "me"]
        assert [j.id for j in (await store.page(limit=12)).jobs] == everything[::-1]
        assert not (await store.page(limit=12)).has_more and (await store.page(limit=11)).has_more
        assert (await store.page(after=everything[0])).jobs == []
        for wrong in ({"limit": 0}, {"limit": 101}, {"after": "video_no"}, {"order": "up"}):
            with pytest.raises(InvalidParameterError) as error:
                await store.page(**wrong)
            assert error.value.param == next(iter(wrong))
        with pytest.raises(InvalidParameterError):
            await store.page(after=everything[0], owner="me")  # which is another's
        assert await store.get(everything[0], "me") is None and await store.get(everything[1], "me") is not None

    with_store(tmp_path, use)


def test_what_is_unfinished_expired_and_removable(tmp_path):
    async def use(store):
        a, b, c, d = [make_job(inputs=(StoredFile(f"in{i}", 100, "image"),)) for i in range(4)]
        late = await add_in(store, a, "in_progress")
        first = await add_in(store, b, "in_progress")
        waiting = await add_in(store, c, "queued")
        done = completed(first, at=3.0)
        found = [(job_id, each.attempts, each.owner) for job_id, each in (await store.unclaimed()).items()]
        assert found == [(a.id, 1, a.owner), (b.id, 1, b.owner), (c.id, 0, c.owner)]
        assert await store.replace(first, done)
        assert await store.replace(late, completed(late, at=4.0))
        assert await store.replace(waiting, failed(waiting, at=5.0))
        without_files = await add_in(store, make_job(), "failed")
        await store.add(d)
        assert await unfinished(store) == [d]
        assert [job.id for job in await store.removable()] == [b.id, a.id, c.id, without_files.id]
        assert [job.id for job in await store.removable(failed_first=True)] == [c.id, without_files.id, b.id, a.id]
        assert await store.last_end() == 5.0
        for at, ids in {None: [], 12.5: [without_files.id], 14.0: [b.id, a.id, without_files.id]}.items():
            assert [job.id for job in await store.expired(Horizon(Moment("now", 0.0), at))] == ids
        records = [len(msgspec.json.encode(job)) for job in (await store.page(limit=10)).jobs]
        assert (await store.usage()).num_bytes_records == sum(records)
        usage, waits = await store.usage(), len(msgspec.json.encode(d))
        assert (usage.num_bytes, usage.num_bytes_finished) == (420 + sum(records), 320 + sum(records) - waits)
        assert await file_names(store) == {"in0", "in1", "in2", "in3", f"{a.id}.0.png", f"{b.id}.0.png"}

    with_store(tmp_path, use)


def test_every_commit_is_synced(tmp_path):
    async def use(store):
        pragmas = ("journal_mode", "synchronous")
        found = [await store._call(lambda n=n: store._connection.execute(f"PRAGMA {n}").fetchone()[0]) for n in pragmas]
        assert found == ["wal", 2]
        for _ in range(200):
            await store.add(make_job())
        assert (tmp_path / "jobs.sqlite3-wal").stat().st_size < 1 << 20

    with_store(tmp_path, use)


OPEN = "import sys; from pathlib import Path; import safelight.serving.jobs.sqlite as s; s.SqliteJobStore(Path({!r}));"


def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path):
    script = OPEN.format(str(tmp_path)) + "print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        with pytest.raises(StateDirectoryError, match="another server") as error:
            SqliteJobStore(tmp_path)
        assert error.value.exit_code == 5
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=30)

    async def use(store):
        with pytest.raises(StateDirectoryError, match="another server"):
            SqliteJobStore(tmp_path)

    with_store(tmp_path, use)
    with_store(tmp_path, lambda store: store.add(make_job()))


def test_a_newer_version_is_left_alone(tmp_path):
    with_store(tmp_path, lambda store: store.add(make_job()))
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    for _ in range(2):  # a refusal leaves neither lock nor thread behind
        with pytest.raises(StateDirectoryError, match="version 2"):
            SqliteJobStore(tmp_path)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    assert len(with_store(tmp_path, unfinished)) == 1


def test_directories_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "jobs.sqlite3").write_text("no database " * 1000)
    for name in ("file", "file/below", "other"):
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            SqliteJobStore(tmp_path / name)
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            SqliteJobStore(disk / "state")
        (disk / "filling").unlink()
        with_store(disk / "state", lambda store: store.add(make_job()))
        fill(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            SqliteJobStore(disk / "state")
        (disk / "filling").unlink()
        make_read_only(disk)
        with pytest.raises(StateDirectoryError, match="cannot be used"):
            SqliteJobStore(disk / "state")


def test_a_full_disk_changes_nothing_and_passes(tmp_path):
    async def use(store):
        added = []
        with pytest.raises(StorageFullError):
            for _ in range(1000):
                added.append(await store.add(make_job(params={"prompt": os.urandom(4096).hex()})))
        assert await unfinished(store) == added
        (tmp_path / "disk" / "filling").unlink()
        added.append(await store.add(make_job()))
        assert await unfinished(store) == added

    with small_disk(tmp_path / "disk") as disk:
        fill(disk, leave=1 << 20)
        with_store(disk / "state", use)


def test_a_start_reads_one_record_after_the_other(tmp_path):
    """Three hundred jobs of 100 KB: they were 30 MB at once."""
    script = """
import asyncio, sys, pathlib
from safelight.serving.jobs.job import Job, JobError, StoredFile
from safelight.serving.jobs.sqlite import SqliteJobStore
def kib(): return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
async def main():
    store = SqliteJobStore(pathlib.Path(sys.argv[1]))
    await store._call(store._connection.execute, "PRAGMA synchronous = OFF")
    for n in range(300):
        job = Job(id=f"image_{n}", kind="image", model="m", params={"prompt": "x" * 100_000}, created_at=1.0)
        await store.add(job)
        await store.replace(job, job.failed(JobError("cancelled", "c")))
    before = kib()
    assert len(await store.kept([f"image_{n}" for n in range(300)])) == 300
    print(kib() - before)
    await store.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) < 10 * 1024


async def taken(store: SqliteJobStore, lease: int, job: Job) -> Job:
    """Claim a job, which must be there to be claimed."""
    claimed = await store.claim(job.id, lease)
    assert claimed is not None and claimed.lease == lease
    return claimed


def with_clock(folder: Path, use):
    async def main():
        clock = Clock()
        store = SqliteJobStore(folder, Clocks(clock, clock.moment))
        try:
            return await use(store, clock)
        finally:
            await store.close()

    return asyncio.run(main())


def test_a_job_is_claimed_by_one_lease(tmp_path):
    async def use(store, clock):
        a, b = await store.begin_lease("a", 30.0), await store.begin_lease("b", 30.0)
        own = make_job(lease=a)
        assert await store.add(own) is own and await store.get(own.id) == own
        free = await store.add(make_job())
        assert list(await store.unclaimed()) == [free.id]
        assert await store.claim(own.id, b) is None and await store.claim(own.id, a) is None
        held = await asyncio.gather(*(store.claim(free.id, lease) for lease in (a, b, a)))
        assert [job and job.lease for job in held] == [a, None, None]
        assert await store.renew_lease(a, 30.0) == {own.id, free.id} and await store.renew_lease(b, 30.0) == set()
        assert await store.claim("image_none", a) is None and await store.claim(free.id, 99) is None
        done = failed(held[0])
        assert await store.replace(held[0], done) and done.lease is None and await store.get(free.id) == done
        assert await store.renew_lease(a, 30.0) == {own.id}
        assert await store.claim(free.id, b) is None, "it has finished"
        assert await store.delete(own.id) == own
        assert await store.renew_lease(a, 30.0) == set()
        stale = make_job(lease=99)
        added = await store.add(stale)
        assert added.lease is None and await store.get(stale.id) == added, "added by a lease that has ended"

    with_clock(tmp_path, use)


def test_a_lease_that_is_not_renewed_is_given_up_and_fences_its_server_off(tmp_path):
    async def use(store, clock):
        a, b = await store.begin_lease("a", 30.0), await store.begin_lease("b", 30.0)
        job = await taken(store, a, await store.add(make_job()))
        begun = job.begun(1.0)
        assert await store.replace(job, begun)
        clock.set(1e12)  # for people; nothing passes
        assert await store.renew_lease(b, 30.0) == set() and await store.claim(job.id, b) is None
        clock.now += 29.0
        assert await store.renew_lease(b, 30.0) == set() and await store.claim(job.id, b) is None
        clock.now += 1.0
        assert await store.claim(job.id, b) is None, "nobody has given it up"
        assert await store.renew_lease(b, 30.0) == set()
        assert not await store.replace(begun, completed(begun)), "its lease has been given up"
        again = await taken(store, b, job)
        assert (again.attempts, again.state) == (1, "in_progress")
        for late in (completed(begun), failed(begun), begun.begun(2.0)):
            assert not await store.replace(begun, late)
        assert await store.renew_lease(a, 30.0) is None
        assert await store.renew_lease(b, 30.0) == {job.id}
        assert await store.replace(again, again.begun(3.0))

    with_clock(tmp_path, use)


def test_a_lease_that_nobody_gave_up_goes_on(tmp_path):
    async def use(store, clock):
        a = await store.begin_lease("a", 30.0)
        job = await taken(store, a, await store.add(make_job()))
        clock.now += 1000.0
        assert await store.renew_lease(a, 30.0) == {job.id}

    with_clock(tmp_path, use)


def test_a_server_that_starts_again_has_its_jobs_at_once_and_its_former_self_has_none(tmp_path):
    async def use(store, clock):
        a, b = await store.begin_lease("a", 30.0), await store.begin_lease("b", 30.0)
        jobs = [await taken(store, lease, await store.add(make_job())) for lease in (a, b)]
        again = await store.begin_lease("a", 30.0)
        assert again not in (a, b) and await store.claim(jobs[1].id, again) is None
        assert not await store.replace(jobs[0], failed(jobs[0]))
        await taken(store, again, jobs[0])
        assert await store.renew_lease(b, 0.0) == set()
        await taken(store, again, jobs[1])
        return again

    async def later(store, clock):
        clock.boot = "another"  # the machine was started: nothing that was held then is
        new = await store.begin_lease("c", 30.0)
        assert new > last and await store.renew_lease(new, 30.0) == set()
        assert len(await store.unclaimed()) == 2

    last = with_clock(tmp_path, use)
    with_clock(tmp_path, later)


EARLIER = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, owner TEXT NOT NULL,
    idempotency_key TEXT, state TEXT NOT NULL, attempts INTEGER NOT NULL, completed_at REAL, expires_at REAL,
    num_bytes INTEGER NOT NULL, record BLOB NOT NULL, expires_clock TEXT, expires_moment REAL, turn INTEGER
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_end ON jobs (state, completed_at);
CREATE TABLE removed (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX jobs_by_turn ON jobs (turn);
PRAGMA journal_mode = WAL;
PRAGMA user_version = 1;
"""
"""Of the version before leases."""


def test_a_database_of_before_there_were_leases_is_opened_and_its_jobs_are_run(tmp_path):
    size = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 1.0}
    fields = {"model": "stub/pictures", "params": {"prompt": "a", "seed": 1, "n": 1, **size}}
    queued, twice, once = [make_job(**fields) for _ in range(3)]
    once, twice = once.begun(1.0), twice.begun(1.0).begun(1.5)
    done = failed(make_job(**fields), at=999.0)  # it has not expired
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.executescript(EARLIER)
        for job in (queued, twice, once, done):
            record = msgspec.to_builtins(job)
            del record["lease"]
            row = (job.id, job.kind, "", job.state, job.attempts, job.completed_at, job.expires_at, job.num_bytes)
            insert = "INSERT INTO jobs (id, kind, owner, state, attempts, completed_at, expires_at, num_bytes, record)"
            connection.execute(f"{insert} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, msgspec.json.encode(record)))
    connection.close()

    async def use(server):
        assert await server.get(done.id) == done
        ended = [await server.end(job) for job in (queued, twice, once)]
        assert [(job.state, job.attempts) for job in ended] == [("completed", 1), ("failed", 2), ("completed", 2)]
        assert ended[1].error is not None and ended[1].error.code == "worker_lost"

    async def look(server):
        assert [job.state for job in (await server.store.page(order="asc")).jobs] == [
            *("completed", "failed", "completed", "failed"),
        ]

    serving(tmp_path, use)
    serving(tmp_path, look)


KEYS = st.sampled_from(["k1", "k2"]) | st.none()
CRASHES = st.sampled_from(["none", "none", "before", "torn", "after"])


class StoreAgainstDict(RuleBasedStateMachine):
    """A store, and a dict that says what must be in it; the server dies before, in the midst of, or after a commit."""

    @initialize()
    def open(self):
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.runner = asyncio.Runner()
        self.states = (self.folder / f"state{n}" for n in itertools.count())
        self.state = next(self.states)
        self.store = SqliteJobStore(self.state)
        self.model: dict[str, Job] = {}
        self.forms: list[Job] = []  # every form that any job ever had
        self.leases: dict[str, int] = {}

    def write(self, coroutine, crash, data):
        """Do a write and, by the way of the crash, go on with what a dead server would have left."""
        before, left = dict(self.model), next(self.states)
        wal = self.state / "jobs.sqlite3-wal"
        size = wal.stat().st_size if wal.exists() else 0
        if crash == "before":

            def snapshot(statement):
                if statement == "COMMIT":
                    as_left_by_a_death(self.state, left)

            self.run(self.store._call(self.store._connection.set_trace_callback, snapshot))
        result = self.run(coroutine)
        if crash == "before":
            self.run(self.store._call(self.store._connection.set_trace_callback, None))
        elif crash != "none":
            as_left_by_a_death(self.state, left)
        if crash == "torn" and (new := wal.stat().st_size) > size:
            os.truncate(left / wal.name, data.draw(st.integers(size, new - 1)))
            crash = "before"
        if not left.exists():  # no crash, or the write was refused before its commit
            return result, False
        self.run(self.store.close())
        shutil.rmtree(self.state)
        self.state, self.store = left, SqliteJobStore(left)
        if crash == "before":
            self.model = before
        return result, crash == "before"

    def run(self, coroutine):
        return self.runner.run(coroutine)

    @rule(
        kind=st.sampled_from(["image", "video"]),
        owner=st.sampled_from(["", "me"]),
        key=KEYS,
        crash=CRASHES,
        data=st.data(),
    )
    def add(self, kind, owner, key, crash, data):
        job = make_job(kind, owner=owner, idempotency_key=key, digest="d")
        same = [j for j in self.model.values() if key is not None and (j.owner, j.idempotency_key) == (owner, key)]
        accepted, undone = self.write(self.store.add(job), crash, data)
        assert accepted.id == (same[0].id if same else job.id)
        if not same and not undone:
            self.model[job.id] = job
            self.forms.append(job)

    @precondition(lambda self: self.forms)
    @rule(data=st.data(), step=st.sampled_from(["begin", "begin", "complete", "fail"]), crash=CRASHES)
    def advance(self, data, step, crash):
        """From a form that a job has, or had once."""
        old = data.draw(st.sampled_from(self.forms))
        steps: dict[str, Any] = {"begin": Job.begun, "complete": completed, "fail": failed}
        new = steps[step](old, 2.0)
        current = self.model.get(old.id)
        legal = (
            current == old and {"begin": old.attempts < 2, "complete": old.state == "in_progress", "fail": True}[step]
        )
        legal = legal and old.state in ("queued", "in_progress")
        done, undone = self.write(self.store.replace(old, new), crash, data)
        assert done == legal
        if done and not undone:
            self.model[old.id] = new
            self.forms.append(new)

    @precondition(lambda self: self.forms)
    @rule(data=st.data(), crash=CRASHES)
    def delete(self, data, crash):
        job_id = data.draw(st.sampled_from(self.forms)).id
        found, undone = self.write(self.store.delete(job_id), crash, data)
        assert found == self.model.get(job_id)
        if not undone:
            self.model.pop(job_id, None)

    @rule(server=st.sampled_from("ab"), crash=CRASHES, data=st.data())
    def begin_lease(self, server, crash, data):
        lease, undone = self.write(self.store.begin_lease(server, 1e9), crash, data)
        if not undone:
            self.give_up(self.leases.get(server))
            self.leases[server] = lease

    @precondition(lambda self: self.leases)
    @rule(crash=CRASHES, data=st.data())
    def end_lease(self, crash, data):
        server = data.draw(st.sampled_from(sorted(self.leases)))
        _, undone = self.write(self.store.renew_lease(self.leases[server], 0.0), crash, data)
        if not undone:
            self.give_up(self.leases.pop(server))

    def give_up(self, lease):
        for job in self.model.values():
            if lease is not None and job.lease == lease:
                self.model[job.id] = msgspec.structs.replace(job, lease=None)
                self.forms.append(self.model[job.id])

    @precondition(lambda self: self.forms and self.leases)
    @rule(data=st.data(), crash=CRASHES)
    def claim(self, data, crash):
        old, lease = data.draw(st.sampled_from(self.forms)), data.draw(st.sampled_from(sorted(self.leases.values())))
        current = self.model.get(old.id)
        claimed, undone = self.write(self.store.claim(old.id, lease), crash, data)
        if current is None or current.finished or current.lease is not None:
            assert claimed is None
        else:
            assert claimed == msgspec.structs.replace(current, lease=lease)
        if claimed is not None and not undone:
            self.model[old.id] = claimed
            self.forms.append(claimed)

    @rule(kind=st.sampled_from(["image", "video"]) | st.none(), owner=st.sampled_from(["", "me"]) | st.none())
    def page(self, kind, owner):
        page = self.run(self.store.page(kind, owner, limit=3, order="asc"))
        expected = [j for j in self.model.values() if kind in (None, j.kind) and owner in (None, j.owner)]
        assert page.jobs == expected[:3] and page.has_more == (len(expected) > 3)

    @invariant()
    def same(self):
        jobs = self.run(self.store.page(limit=100, order="asc")).jobs
        assert jobs == list(self.model.values())
        assert self.run(unfinished(self.store)) == [job for job in jobs if not job.finished]
        assert self.run(self.store.usage()).num_bytes == sum(job.num_bytes for job in jobs)
        for lease in self.leases.values():
            held = {job.id for job in jobs if job.lease == lease}
            assert self.run(self.store.renew_lease(lease, 1e9)) == held

    def teardown(self):
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.folder)


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
