"""One attack on a live server, measured from outside: what it took from others, and what it left behind."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.live_server import LiveServer, generate
from tests.reliability.attack import Attack
from tests.reliability.attack_processes import ATTACKS, BETWEEN
from tests.reliability.conftest import CONTROL, gauge, picture_of

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 0.1
"""Of `/livez`, at the 99th percentile."""
MOST_BYTES = 300_000_000
MOST_HELPER_BYTES = 600_000_000
"""Of what tries pictures, one at a time: of 25 megapixels in WebP they take 16 bytes a pixel in the library."""
"""Of the API process, over its rest."""
LEFT_BYTES = 100_000_000
"""Of these, that may be kept when all is over."""
LOG_BYTES = 1_000_000
"""That an attack may add to the log."""
SAMPLE_SECONDS = 0.05
SETTLING_SECONDS = 30.0
START_SECONDS = 120.0
"""For what an attack sends to be made."""


@dataclass
class Row:
    """What was measured. Times are in seconds, sizes in bytes.

    Attributes:
        name, says: of the attack.
        median, p99, longest: of `/livez`, for somebody who asks at any time.
        late: of whoever asks, at the 99th percentile: how long the machine kept it from asking.
        own: the 99th percentile without the time in which the kernel gave the event loop's processor to others.
        asked, unanswered: questions, and those that were not answered.
        api, worker: memory over the rest, at its highest, of the API process and of the workers.
        helpers: memory, at its highest, of all else that the API has started: who tries large pictures.
        left: memory of the API over the rest, when all was over.
        visits: what another client was answered, and after how long.
        answers: what the attack was answered.
        faults: what was not as promised; empty where all was.

    """

    name: str
    says: str
    median: float = 0.0
    p99: float = 0.0
    longest: float = 0.0
    late: float = 0.0
    own: float = 0.0
    asked: int = 0
    unanswered: int = 0
    api: int = 0
    worker: int = 0
    helpers: int = 0
    left: int = 0
    visits: list[tuple[str, float]] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def served(self) -> int:
        """How many visits gave a picture."""
        return sum(status == "200" for status, _ in self.visits)


def at_any_time(took: Sequence[float], between: float = BETWEEN) -> list[float]:
    """Return, sorted, how long it takes somebody who asks at any time, from questions that were asked in turn.

    While one question waits the next ones are not asked; they would have waited too, each for a part of it.
    """
    found = list(took)
    for seconds in took:
        while (seconds := seconds - between) > 0:
            found.append(seconds)
    return sorted(found)


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which that part of sorted ones is."""
    return values[min(len(values) - 1, int(part * len(values)))]


def status_of(pid: int, name: str) -> int:
    """Return a size, in bytes, of what the kernel says of a process; 0 of one that is gone."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return 1024 * int(found[1]) if found else 0
    return 0


def below(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and those that these have."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                yield child
                yield from below(child)


class Memory:
    """Of a server's processes: the API's, the workers with all below them, and helpers, which are all others.

    Args:
        server: at rest.

    """

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._worker = {server.worker(), *below(server.worker())}
        self.rest = self.now()

    def _pids(self) -> tuple[set[int], set[int], set[int]]:
        pid = self._server.process.pid
        return {pid}, self._worker, set(below(pid)) - self._worker

    def now(self) -> tuple[int, int]:
        """Return the bytes of the API and of the workers."""
        api, worker, _ = [sum(status_of(pid, "VmRSS") for pid in pids) for pids in self._pids()]
        return api, worker

    @contextlib.contextmanager
    def peak(self, row: Row) -> Iterator[None]:
        """Fill in the highest of each while the block runs, over the rest: the kernel's own mark of each process.

        Of helpers that come and go, as those that try pictures, those count together that are there at one time.
        """
        for pid in set.union(*self._pids()):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        highest = [0, 0, 0]
        over = threading.Event()

        def look() -> None:
            for place, pids in enumerate(self._pids()):
                highest[place] = max(highest[place], sum(status_of(pid, "VmHWM") for pid in pids))

        def watch() -> None:
            while not over.wait(SAMPLE_SECONDS):
                look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look()
            row.api, row.worker, row.helpers = highest[0] - self.rest[0], highest[1] - self.rest[1], highest[2]


class Epilogue:
    """What a server must be after whatever happened to it: as it was.

    Args:
        server: which has been warmed up.

    """

    def __init__(self, server: LiveServer) -> None:
        self._server, self._worker = server, server.worker()
        with server.http() as http:
            self._control = picture_of(generate(http, CONTROL))
            self._descriptors, self._files = server.num_descriptors(), self._names()
        self._logged = server.log.stat().st_size

    def _names(self) -> set[str]:
        """Return the files that are neither the state nor its outputs."""
        folder = self._server.log.parent
        outputs = folder / "state" / "outputs"
        found = [path for path in folder.rglob("*") if folder / "state" not in path.parents]
        return {str(path.relative_to(folder)) for path in (*found, *outputs.rglob(".tmp-*"))}

    def _not_yet(self, http: httpx.Client) -> list[str]:
        """Return what is still of the attack, and may need a moment."""
        metrics, faults = http.get("/metrics").text, []
        if busy := gauge(metrics, "safelight_requests_running") + gauge(metrics, "safelight_requests_waiting"):
            faults.append(f"{busy:.0f} requests are there still")
        if (more := self._server.num_descriptors() - self._descriptors) > 0:
            faults.append(f"{more} descriptors are left")
        if left := self._names() - self._files:
            faults.append(f"files are left: {', '.join(sorted(left)[:3])}")
        return faults

    def __call__(self) -> list[str]:
        """Return what is not as it was, once it had time to become so."""
        if self._server.process.poll() is not None:
            return [f"the server ended with {self._server.process.returncode}"]
        end = time.monotonic() + SETTLING_SECONDS
        try:
            with self._server.http(SETTLING_SECONDS) as http:
                while (faults := self._not_yet(http)) and time.monotonic() < end:
                    time.sleep(0.1)
                if (status := http.get("/readyz").status_code) != 200:
                    faults.append(f"/readyz is {status}")
                answer = generate(http, CONTROL)
                if answer.status_code != 200 or picture_of(answer) != self._control:
                    faults.append(f"the control request is {answer.status_code}, or another picture")
        except httpx.HTTPError as error:
            return [f"it does not answer: {type(error).__name__}"]
        if self._server.children()[:1] != [self._worker]:
            faults.append("the worker was lost")
        logged, self._logged = self._logged, self._server.log.stat().st_size
        if self._logged - logged > LOG_BYTES:
            faults.append(f"{self._logged - logged} bytes were logged")
        return faults


class Beside:
    """A process beside the server."""

    def __init__(self, kind: str, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.reliability.attack_processes", kind, *map(str, arguments)]
        self._kind = kind
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def wait_ready(self) -> None:
        """Wait until it can begin."""
        line = self._within(START_SECONDS, self._out.readline)
        assert line == "ready\n", f"what should {self._kind} did not become ready"

    def tell(self) -> None:
        """Tell it to begin, or to end."""
        self._in.write("\n")
        self._in.flush()

    def found(self, seconds: float) -> Any:
        """Return what it found, when it has ended by itself."""
        said = self._within(seconds, lambda: self._out.read())
        assert said, f"what should {self._kind} found nothing"
        return json.loads(said)

    def _within(self, seconds: float, call: Callable[[], str]) -> str:
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            return call()
        finally:
            timer.cancel()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class Range:
    """A server, warmed up, that is attacked again and again."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        server.wait_ready()
        with server.http() as http:
            warm_up(http)
        self.memory, self.epilogue = Memory(server), Epilogue(server)

    def measure(self, name: str, seconds: float, attack: Attack | None = None, is_busy: bool = False) -> Row:
        """Let it be attacked for so long; return what was measured, and judged; `is_busy` says by what (`judged`)."""
        attack = attack or ATTACKS[name]
        row, port = Row(name, attack.says), self.server.port
        with contextlib.ExitStack() as stack:
            attacking, asking, visiting = (
                Beside("attack", port, seconds * attack.times, name),
                Beside("ask", port, self.server.process.pid),
                Beside("visit", port),
            )
            for each in (attacking, asking, visiting):
                stack.callback(each.close)
                each.wait_ready()
            with self.memory.peak(row):
                for each in (asking, visiting, attacking):
                    each.tell()
                row.answers = attacking.found(seconds * attack.times + 120.0)
                asking.tell()
                visiting.tell()
                asked, row.visits = asking.found(60.0), visiting.found(60.0)
        took, late = at_any_time(asked["took"]), sorted(asked["late"])
        row.median, row.p99, row.longest = statistics.median(took), quantile(took, 0.99), took[-1]
        own = [max(0.0, all - others) for all, others in zip(asked["took"], asked["others"], strict=True)]
        row.own = quantile(at_any_time(own), 0.99)
        row.late, row.asked, row.unanswered = quantile(late, 0.99), len(late), asked["failed"]
        row.faults = self.epilogue()
        row.left = self.memory.now()[0] - self.memory.rest[0]
        row.faults[:0] = judged(row, attack, is_busy)
        return row


def judged(row: Row, attack: Attack, is_busy: bool = False) -> list[str]:
    """Return which bounds a row misses. On a machine that is busy with other things, `/livez` is judged by `own`."""
    p99 = row.own if is_busy else row.p99
    shown = {mark for mark in row.answers if mark.isdigit()}
    other = ", ".join(sorted({status for status, _ in row.visits} - {"200"}))
    never = [
        f"{mark} ({row.answers.get(mark, 0)})"
        for mark, least in attack.shows.items()
        if row.answers.get(mark, 0) < least
    ]
    misses = {
        f"/livez p99 is {1000 * p99:.0f} ms": p99 > MOST_SECONDS,
        f"{row.unanswered} of {row.asked} questions were not answered": row.unanswered > 0,
        f"the API takes {row.api / 1e6:.0f} MB over its rest": row.api > MOST_BYTES,
        f"its helpers take {row.helpers / 1e6:.0f} MB": row.helpers > MOST_HELPER_BYTES,
        f"the API keeps {row.left / 1e6:.0f} MB": row.left > LEFT_BYTES,
        f"another client was served {row.served} of {len(row.visits)} times, else {other}": row.served
        < len(row.visits),
        f"answers of {', '.join(sorted(shown - attack.answers))}": bool(shown - attack.answers),
        f"it was no attack: too few of {', '.join(never)}, but {row.answers}": bool(never),
    }
    return [said for said, missed in misses.items() if missed]


def warm_up(http: httpx.Client) -> None:
    """Ask once for everything, so that the rest has all that a server takes once."""
    job = http.post(
        "/v1/images/generations", json={"prompt": "a cat"}, headers={"prefer": "respond-async"}
    ).raise_for_status()
    path = f"/v1/jobs/{job.json()['id']}"
    http.get(f"{path}/events").raise_for_status()
    assert http.get(f"{path}/content").status_code == 200
    assert http.post("/v1/images/generations", json={"prompt": "a cat", "stream": True}).status_code == 200
    for _ in range(20):
        assert generate(http).status_code == 200
    # Of the first large picture the memory is counted, and for the first large input zmq makes a thread.
    picture = generate(http, size="1024x1024").json()["data"][0]["b64_json"]
    assert http.post(
        "/v1/images/edits", json={"prompt": "a cat", "image": f"data:image/png;base64,{picture}"}
    ).is_success
    assert http.post("/v1/images/edits", data={"prompt": "x" * (1 << 20)}, files={"image": b""}).status_code == 400
    assert http.post("/v1/images/generations", json={"prompt": "x" * (1 << 20)}).status_code == 400
    for path in ("/openapi.json", "/metrics", "/readyz", "/v1/models", "/v1/videos"):
        http.get(path).raise_for_status()
