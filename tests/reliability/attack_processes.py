"""The processes beside a server under attack: `python -m tests.reliability.attack_processes KIND PORT ...`.

`attack` sends; `ask` asks `/livez`; `visit` is another client. Each says that it is ready, begins when it is told a
line, and prints what it found as JSON: `ask` and `visit` when they are told another.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import select
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.reliability.attack import Attack
from tests.reliability.attacker import STATUS, Attacker, main_of, post, request
from tests.reliability.large_attacks import LARGE_ATTACKS
from tests.reliability.small_attacks import SMALL_ATTACKS

ATTACKS: Mapping[str, Attack] = {**SMALL_ATTACKS, **LARGE_ATTACKS}
BETWEEN = 0.005
"""Seconds between two questions."""
VISIT_SECONDS = 0.4
"""Between two visits."""
GIVEN_UP = 10.0
VISITOR = "127.0.0.2"
"""Another address of this machine: another client, who has a share of his own."""
PICTURE = post("/v1/images/generations", {"prompt": "a visitor", "seed": 1})


def is_told() -> bool:
    """Say whether there is something to read."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def begin() -> None:
    """Wait until it is time."""
    print("ready", flush=True)
    sys.stdin.readline()


def connected(port: int, source: str = "") -> socket.socket:
    """Return a connection from an address of this machine."""
    return socket.create_connection(("127.0.0.1", port), GIVEN_UP, (source, 0))


def waited_in(schedule: Path) -> float:
    """Return for how many seconds a thread could have run, and waited for a processor, in its life."""
    try:
        return int(schedule.read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # it is gone
        return 0.0


def ask(port: int, pid: int) -> None:
    """Ask `/livez` on one connection, at a normal priority; print how long each took.

    And how late this process was, and for how long of each the kernel gave the processor to others than the event loop
    of the server, whose process is `pid`.
    """
    question, took, late, others, failed = request("GET", "/livez"), list[float](), list[float](), list[float](), 0
    schedule = Path(f"/proc/{pid}/task/{pid}/schedstat")
    sock = connected(port)
    begin()
    gc.disable()
    while not is_told():
        planned = time.monotonic() + BETWEEN
        time.sleep(BETWEEN)
        waited, began = waited_in(schedule), time.monotonic()
        late.append(began - planned)
        try:
            sock.sendall(question)
            answer = b""
            while b'"ok"' not in answer:
                if not (more := sock.recv(4096)):
                    raise ConnectionError
                answer += more
        except OSError:
            failed += 1
            sock.close()
            with contextlib.suppress(OSError):
                sock = connected(port)
        took.append(time.monotonic() - began)
        others.append(waited_in(schedule) - waited)
    print(json.dumps({"took": took, "others": others, "late": late, "failed": failed}), flush=True)


def visit(port: int) -> None:
    """Ask for a picture now and then, on a new connection each time; print what each was answered, and after what."""
    found: list[tuple[str, float]] = []
    begin()
    while not is_told():
        began, status = time.monotonic(), "closed"
        with contextlib.suppress(OSError), connected(port, VISITOR) as sock:
            sock.sendall(PICTURE)
            if match := STATUS.match(sock.recv(1 << 20)):
                status = match[1].decode()
        found.append((status, time.monotonic() - began))
        select.select([sys.stdin], [], [], max(0.0, began + VISIT_SECONDS - time.monotonic()))
    print(json.dumps(found), flush=True)


def main() -> None:
    """Be one of the processes."""
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "attack":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        main_of(Attacker(port, float(sys.argv[3])), ATTACKS[sys.argv[4]].prepare)
    elif kind == "ask":
        ask(port, int(sys.argv[3]))
    else:
        visit(port)


if __name__ == "__main__":
    main()
