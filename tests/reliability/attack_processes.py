"""The processes beside a server under attack: `python -m tests.reliability.attack_processes KIND PORT [SECONDS NAME]`.

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


def ask(port: int) -> None:
    """Ask `/livez` on one connection, at a normal priority; print how long each took, and how late this process was."""
    question, took, late, failed = request("GET", "/livez"), list[float](), list[float](), 0
    sock = connected(port)
    begin()
    gc.disable()
    while not is_told():
        planned = time.monotonic() + BETWEEN
        time.sleep(BETWEEN)
        began = time.monotonic()
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
    print(json.dumps({"took": took, "late": late, "failed": failed}), flush=True)


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
    else:
        {"ask": ask, "visit": visit}[kind](port)


if __name__ == "__main__":
    main()
