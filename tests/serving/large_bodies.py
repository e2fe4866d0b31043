"""How long `/livez` takes while clients send bodies of 28 MB: `python -m tests.serving.large_bodies [KIND ...]`.

The server, on a stub engine, is a process of its own, and so is the client that asks beside eight that send. A line for
each kind of body: milliseconds at the median, the 99th percentile and the longest, and what the bodies were answered.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.serving.http_server import running
from tests.serving.stub_engine import EDIT_SCHEMA

SIZE = 28_000_000
SENDERS = 8
SECONDS = 5.0
BETWEEN = 0.01
"""Seconds between two questions."""
HEAD = "POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: {}\r\ncontent-length: {}\r\n\r\n"
FORM = "multipart/form-data; boundary=b"


def _json(fields: Mapping[str, object]) -> tuple[str, bytes]:
    return "application/json", json.dumps(fields, ensure_ascii=False).encode()


def _noise(size: int) -> bytes:
    return random.Random(1).randbytes(size)


def _broken(size: int) -> str:
    return base64.encodebytes(_noise(size * 3 // 4)).decode()


def _part(name: str, data: bytes) -> tuple[str, bytes]:
    return FORM, b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n--b--\r\n' % (name.encode(), data)


PNG = b"\x89PNG\r\n\x1a\n"
KINDS: Mapping[str, Callable[[], tuple[str, bytes]]] = {
    "nothing": lambda: ("application/json", b"{}"),
    "one text": lambda: _json({"prompt": "x", "user": "x" * SIZE}),
    "one text of no ASCII": lambda: _json({"prompt": "x", "user": "é" * (SIZE // 2)}),
    "one text of wide letters": lambda: _json({"prompt": "x", "user": "😀" * (SIZE // 4)}),
    "a model's name": lambda: _json({"prompt": "x", "model": "x" * SIZE}),
    "a field's name": lambda: _json({"prompt": "x", "x" * SIZE: 1}),
    "a prompt": lambda: _json({"prompt": "x" * SIZE}),
    "100,000 items": lambda: _json({"prompt": "x", "user": ["x" * 270] * 99_000}),
    "100,000 escapes": lambda: _json({"prompt": "x", "user": ("\\" + "x" * 276) * 49_000}),
    "blanks": lambda: ("application/json", b" " * SIZE),
    "blanks and fields": lambda: ("application/json", b'{"prompt": "x"}'.rjust(SIZE)),
    "brackets in a text": lambda: _json({"prompt": "x", "user": "[" * SIZE}),
    "no JSON": lambda: ("application/json", b"x" * SIZE),
    "a picture": lambda: _json(
        {"prompt": "x", "image": "data:image/png;base64," + _broken(21_000_000).replace("\n", "")}
    ),
    "a picture in lines": lambda: _json({"prompt": "x", "image": "data:image/png;base64," + _broken(21_000_000)}),
    "a plain data URL": lambda: _json({"prompt": "x", "image": "data:," + "x" * SIZE}),
    "escapes of a data URL": lambda: _json({"prompt": "x", "image": "data:," + "%41" * 900_000 + "x" * 20_000_000}),
    "a text in a form": lambda: _part("user", b"x" * SIZE),
    "a file in a form": lambda: _part('image"; filename="a', PNG + _noise(SIZE)),
    "line ends in a form": lambda: _part("user", b"\r\n--" * (SIZE // 4)),
    "hyphens in a form": lambda: _part("user", b"\r\n" + b"-" * SIZE),
}


def _serve(folder: Path) -> None:
    with running(folder, EDIT_SCHEMA) as server:
        print(server.port, flush=True)
        sys.stdin.readline()


def _ask(port: int) -> None:
    """Ask one question after another on one connection; print the seconds that each took."""
    took, end = [], time.monotonic() + SECONDS
    with socket.create_connection(("127.0.0.1", port)) as sock:
        while time.monotonic() < end:
            began = time.monotonic()
            sock.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while b'"ok"' not in answer:
                answer += sock.recv(4096)
            took.append(time.monotonic() - began)
            time.sleep(BETWEEN)
    print(json.dumps(took))


def _send(port: int, data: bytes, end: float, answers: Counter[str]) -> None:
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", port)) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            answers[sock.recv(4096)[9:12].decode()] += 1


def _measured(port: int, kind: str) -> str:
    media_type, body = KINDS[kind]()
    data, answers = HEAD.format(media_type, len(body)).encode() + body, Counter[str]()
    asking = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "ask", str(port)], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + SECONDS
    senders = [threading.Thread(target=_send, args=(port, data, end, answers)) for _ in range(SENDERS)]
    for each in senders:
        each.start()
    took = sorted(1000 * seconds for seconds in json.loads(asking.communicate()[0]))
    for each in senders:
        each.join()
    p99 = took[int(0.99 * (len(took) - 1))]
    return f"{kind:26} {statistics.median(took):7.1f} {p99:7.1f} {took[-1]:7.1f}  {dict(answers)}"


def main() -> None:
    """Measure the kinds that are named, or all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, "serve", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            port = int(server.stdout.readline())
            for kind in sys.argv[1:] or KINDS:
                print(_measured(port, kind), flush=True)
            server.stdin.write("\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["ask"]:
        _ask(int(sys.argv[2]))
    else:
        main()
