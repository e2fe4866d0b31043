"""Directories that are somebody else's are refused, and in ours nothing is removed but what is known to be over."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from pathlib import Path

import pytest

from safelight.errors import StateDirectoryError
from safelight.serving import directories
from safelight.serving.directories import MARKER, job_of, listed
from safelight.serving.jobs.folder import FolderFiles
from safelight.serving.jobs.job import new_id
from safelight.serving.jobs.sqlite import SqliteJobStore
from safelight.serving.jobs.store import Kept
from tests.serving.job_server import picture, serving
from tests.serving.stub_engine import EDIT_SCHEMA, VIDEO_SCHEMA, StubEngine

IMAGE, VIDEO = new_id("image"), new_id("video")


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with its bytes, but for what a store writes itself."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("jobs.sqlite3")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in (MARKER, "lock")}


def open_both(state: Path) -> None:
    store = SqliteJobStore(state)
    try:
        asyncio.run(FolderFiles(state / "outputs").close())
    finally:
        asyncio.run(store.close())


FOREIGN = {
    "photographs": ["a.jpg", "2024/b.jpg"],
    "only what looks like outputs": ["outputs/a.jpg"],
    "a picture of ours among outputs": [f"outputs/{IMAGE}.0.png"],
    "a lock of another program": ["lock", "data"],
    "a hidden file": [".profile"],
    "a folder": ["src/main.py"],
}


@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_state_directory_that_is_somebodys_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StateDirectoryError, match="neither empty nor Safelight's") as error:
        open_both(tmp_path)
    assert names[0].partition("/")[0] in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is made in it either"


def not_our_mark(folder: Path, what: str) -> None:
    """Put something of the mark's name beside somebody's file, as a home directory may have."""
    (folder / "mine").write_text("mine")
    mark = folder / MARKER
    if what == "folder":
        mark.mkdir()
    elif what == "link":
        mark.symlink_to(folder / "nowhere")
    elif what == "link to a mark":
        (folder / "other").write_bytes(directories.MARKED)
        mark.symlink_to(folder / "other")
    else:
        mark.write_text(what)


@pytest.mark.parametrize("what", ["folder", "link", "link to a mark", "", "A directory", "another program's"])
@pytest.mark.parametrize("place", ["state", "outputs", "outputs that are a link"])
def test_a_name_is_no_mark(tmp_path, place, what):
    state, home = tmp_path / "state", tmp_path / "home"
    open_both(state)
    if place == "state":
        shutil.rmtree(state)
        state.mkdir()
        not_our_mark(state, what)
    else:
        shutil.rmtree(state / "outputs")
        where = home if place == "outputs that are a link" else state / "outputs"
        where.mkdir()
        not_our_mark(where, what)
        if where == home:
            (state / "outputs").symlink_to(home)
    before = tree(tmp_path)
    with pytest.raises(StateDirectoryError, match="neither empty nor Safelight's"):
        open_both(state)
    assert tree(tmp_path) == before


def test_a_mark_is_made_at_once_and_of_every_version(tmp_path, monkeypatch):
    def cut_short(path, data):
        path.write_bytes(data[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directories, "write_private", cut_short)
        with pytest.raises(KeyboardInterrupt):
            directories.mark(tmp_path)
    assert not directories.is_marked(tmp_path) and not (tmp_path / MARKER).exists()
    asyncio.run(FolderFiles(tmp_path).close())
    (tmp_path / MARKER).write_bytes(directories.MARKED.replace(b"Version 1", b"Version 2"))
    (tmp_path / "mine").write_text("mine")
    asyncio.run(FolderFiles(tmp_path).close())
    assert b"Version 2" in (tmp_path / MARKER).read_bytes()


def test_outputs_of_another_server_are_held(tmp_path):
    """By a link the same folder is two servers'; the second would remove what the first one writes."""
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "outputs").symlink_to(tmp_path / "outputs")
    first = FolderFiles(tmp_path / "outputs")
    with pytest.raises(StateDirectoryError, match=r"outputs directory .* is held by another server"):
        FolderFiles(tmp_path / "second" / "outputs")
    asyncio.run(first.close())
    asyncio.run(FolderFiles(tmp_path / "second" / "outputs").close())


@pytest.mark.parametrize("name", ["a.jpg", "image_1.0.png", ".tmp-1", ".safelight-ab", "x/.tmp-0123456789abcdef"])
def test_outputs_that_are_somebodys_are_refused(tmp_path, name):
    open_both(tmp_path)
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs" / name).parent.mkdir(parents=True)
    (tmp_path / "outputs" / name).write_text("mine")
    with pytest.raises(StateDirectoryError, match=r"outputs directory .* neither empty nor Safelight's"):
        open_both(tmp_path)
    assert (tmp_path / "outputs" / name).read_text() == "mine"


def test_a_database_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute("CREATE TABLE people (name TEXT)")
    connection.close()
    for _ in range(2):
        with pytest.raises(StateDirectoryError, match="another program's database"):
            open_both(tmp_path)
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("people",)]
    connection.close()
    assert not (tmp_path / MARKER).exists()


def test_what_an_older_version_made_is_opened(tmp_path):
    """It marked nothing, and left modes to the process."""

    async def use(server):
        assert (await server.end(await server.submit())).state == "completed"

    serving(tmp_path, use)
    before = tree(tmp_path)
    assert len(before) == 1
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as connection:
        connection.execute("DROP TABLE removed")
    connection.close()
    for path in (tmp_path / MARKER, tmp_path / "outputs" / MARKER):
        path.unlink()
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    serving(tmp_path, use)
    assert before.items() <= tree(tmp_path).items()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o600}


def test_an_empty_disk_and_a_start_that_was_cut_short_are_ours(tmp_path):
    (tmp_path / "lost+found").mkdir()
    open_both(tmp_path)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "lock").touch()
    open_both(tmp_path / "cut")


@pytest.mark.parametrize("schema", [EDIT_SCHEMA, VIDEO_SCHEMA])
def test_every_file_is_for_its_owner_alone(tmp_path, schema):
    async def use(server):
        images = {"image": [picture()]} if schema is EDIT_SCHEMA else {}
        assert (await server.end(await server.submit(images=images))).state == "completed"
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
        assert {"jobs.sqlite3", "jobs.sqlite3-wal", "jobs.sqlite3-shm", "lock", MARKER} <= set(modes)
        assert set(modes.values()) == {0o600}, modes

    serving(tmp_path, use, StubEngine(schema))


@pytest.mark.parametrize("what", ["lost", "restored"])
def test_a_lost_or_restored_database_deletes_nothing(tmp_path, caplog, what):
    async def nothing(server):
        pass

    async def use(server):
        job = await server.submit(images={"image": [picture()]})
        assert (await server.end(job)).state == "completed"

    state = tmp_path / "state"
    serving(state, nothing)
    shutil.copy(state / "jobs.sqlite3", tmp_path / "older")
    serving(state, use, StubEngine(EDIT_SCHEMA))
    before = tree(state)
    assert len(before) == 2
    for path in state.glob("jobs.sqlite3*"):
        path.unlink()
    if what == "restored":
        shutil.copy(tmp_path / "older", state / "jobs.sqlite3")
    with caplog.at_level(logging.WARNING):
        serving(state, nothing)
    assert tree(state) == before
    assert all(name.removeprefix("outputs/") in caplog.text for name in before)


def left_by_a_death(folder: Path) -> list[Path]:
    """Write what a server leaves that is killed as it writes."""
    inside = folder / ".safelight-ab3_x9zk"
    inside.mkdir()
    paths = [
        folder / ".tmp-0123456789abcdef",
        folder / ".tmp-0123456789abcdef.mp4",
        inside / ".tmp-0123456789abcdef.mp4",
    ]
    for path in paths:
        path.write_text("half")
    return [*paths, inside]


KEPT = [
    *("notes.txt", ".hidden", ".tmp-1", ".tmp-0123456789abcdef.png", ".tmp-0123456789ABCDEF", "image_1.0.png"),
    *(f"{VIDEO}.0.mp4", f"{IMAGE}", f"{IMAGE}.txt", f"{IMAGE}.0.png.bak~", "\x1b]0;owned\x07.png"),
]


def test_only_what_is_known_to_be_over_is_removed(tmp_path, caplog):
    """A job that is over leaves files, as one does that is removed as the server dies; everything else stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")

    async def kept(job_ids):
        return {IMAGE: Kept(is_over=True, names=frozenset({f"{IMAGE}.0.png"}))} if IMAGE in job_ids else {}

    async def main():
        outputs = FolderFiles(tmp_path / "outputs")
        gone = left_by_a_death(outputs.directory)
        gone += [outputs.directory / f"{IMAGE}.{name}" for name in ("input0", "1.png", "0.mp4.thumbnail.webp")]
        stay = [outputs.directory / name for name in [*KEPT, f"{IMAGE}.0.png"]]
        for path in [*gone, *stay]:
            if not path.exists():
                path.write_text("x")
        (outputs.directory / ".safelight-ab3_x9zl").mkdir()
        (outputs.directory / ".safelight-ab3_x9zl" / "mine").write_text("x")
        (outputs.directory / "folder").mkdir()
        (outputs.directory / ".safelight-ab3_x9zm").symlink_to(outside)
        (outputs.directory / ".tmp-00000000000000ff").symlink_to(outside / "precious")
        with caplog.at_level(logging.WARNING):
            await outputs.clean(kept)
        await outputs.close()
        assert not [path for path in gone if path.exists()]
        assert all(path.exists() for path in stay)

    asyncio.run(main())
    for name in ("folder", ".safelight-ab3_x9zl/mine", ".safelight-ab3_x9zm", ".tmp-00000000000000ff"):
        assert (tmp_path / "outputs" / name).exists()
    assert (outside / "precious").read_text() == "mine"
    (record,) = caplog.records
    assert "notes.txt" not in record.getMessage() or len(record.getMessage()) < 2000
    assert "5 more" in record.getMessage() and "\x1b" not in record.getMessage()


def test_names_in_a_message_are_few_and_harmless():
    text = listed([f"{index:03}\x1b[2J" for index in range(500)])
    assert "490 more" in text and len(text) < 500 and text.isprintable()


def test_what_an_interrupted_removal_left_is_removed_by_the_next_start(tmp_path):
    """The server dies between the two; and as it writes a job's input before the job is there."""

    async def use(server):
        job = await server.end(await server.submit())
        await server.store.delete(job.id)
        await server.store.announce(VIDEO)
        await server.outputs.save({f"{VIDEO}.input0": b"x"})
        assert server.files() == {job.outputs[0].name, f"{VIDEO}.input0"}

    async def look(server):
        assert server.files() == set() and await server.store.kept([VIDEO]) == {}

    serving(tmp_path, use)
    serving(tmp_path, look)


def test_an_input_whose_job_never_came_is_removed_by_the_next_start(tmp_path, monkeypatch):
    """The server dies between the two: nobody knows then whether the job is there."""

    async def fails(job):
        raise RuntimeError("died")

    async def use(server):
        with monkeypatch.context() as patch:
            patch.setattr(server.store, "add", fails)
            with pytest.raises(RuntimeError):
                await server.submit(images={"image": [picture()]})
        assert len(server.files()) == 1

    async def look(server):
        assert server.files() == set()

    for each in (use, look):
        serving(tmp_path, each, StubEngine(EDIT_SCHEMA))


def test_removed_jobs_are_forgotten_once_their_files_are_gone(tmp_path):
    async def use(server):
        for _ in range(3):
            job = await server.end(await server.submit(images={"image": [picture()]}))
            assert await server.jobs.delete(job.id)
            assert await server.store.kept([job.id]) == {job.id: Kept(is_over=True)}
        await server.jobs.sweep()
        assert await server.store.kept([job.id]) == {} and server.files() == set()

    serving(tmp_path, use, StubEngine(EDIT_SCHEMA))


def test_the_forms_of_names():
    ours = ("0.png", "input0", "0.mp4.thumbnail.webp", "attempt2.0.png", "attempt2.0.mp4.spritesheet.jpeg")
    assert {job_of(f"{IMAGE}.{name}") for name in ours} == {IMAGE}
    for name in (
        MARKER,
        "image_0.png",
        f"../{IMAGE}.0.png",
        f"x{IMAGE}.0.png",
        f"{IMAGE}.0.png\n",
        f"{IMAGE}.0",
        f"{IMAGE}.attempt.0.png",
    ):
        assert job_of(name) is None and not directories.is_temporary(name)
