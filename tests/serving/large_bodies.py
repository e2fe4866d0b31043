"""How long `/livez` takes while clients send bodies of 28 MB: `python -m tests.serving.large_bodies [KIND ...]`.

The server, on a stub engine, is a process of its own, and so is the client that asks beside eight that send, or
`SENDERS`. A line for each kind of body, or of connections: milliseconds at the median, the 99th percentile and
the longest; the most memory, and what is left of it afterwards, in MB over what the process took before the first kind;
and what was answered.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
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

import numpy as np
from PIL import Image

from safelight.serving.http.listening import raise_limit
from tests.serving.http_server import running
from tests.serving.stub_engine import EDIT_SCHEMA

SIZE = 28_000_000
SENDERS = int(os.environ.get("SENDERS", "8"))
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


_FIELDS = ((b"prompt", b"x"), (b"size", b"64x64"))


def _picture(kind: str, width: int = 5000, **how: object) -> tuple[str, bytes]:
    """Return a form with a picture of 25 megapixels, with a little noise, that is lying on its side."""
    file, noise = io.BytesIO(), np.zeros((5000, width, 3), np.uint8)
    noise[:1000] = np.random.default_rng(0).integers(0, 9, (1000, width, 3), np.uint8)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(noise).save(file, kind, exif=turned, **how)
    fields = [b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % pair for pair in _FIELDS]
    media_type, picture = _part('image"; filename="a', file.getvalue())
    return media_type, b"".join(fields) + picture


def _many_parts(content: bytes, count: int) -> tuple[str, bytes]:
    part = b'--b\r\ncontent-disposition: form-data; name="image[]"; filename="a"\r\n\r\n%s\r\n' % content
    return FORM, part * count + b"--b--\r\n"


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
    "one text with one wide letter": lambda: _json({"prompt": "x", "user": "x" * SIZE + "😀"}),
    "texts with one wide letter": lambda: _json({"prompt": "x", "user": ["x" * 60_000] * 460 + ["😀"]}),
    "130 texts in objects": lambda: _json({"prompt": "x", "user": [{"a": "x" * 210_000}] * 130}),
    "small objects": lambda: ("application/json", b'{"a":[' + b"{}," * 90_000 + b"1]}" + b" " * (SIZE - 300_000)),
    "deep brackets": lambda: ("application/json", b"[" * SIZE),
    "digits": lambda: ("application/json", b'{"n":' + b"1" * SIZE + b"}"),
    "a picture without its kind": lambda: _json({"prompt": "x", "image": _broken(21_000_000).replace("\n", "")}),
    "parameters of a data URL": lambda: _json({"prompt": "x", "image": "data:a/b;c=" + "x" * SIZE + ",x"}),
    "per cents of a data URL": lambda: _json({"prompt": "x", "image": "data:," + "%" * SIZE}),
    "pictures in JSON": lambda: _json(
        {"prompt": "x", "images": [{"image_url": "data:image/png;base64," + "QUJD" * 430_000}] * 16}
    ),
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
    "line feeds in a form": lambda: _part("user", b"\r\n" * (SIZE // 2)),
    "boundaries in a form": lambda: _part("user", b"\r\n--b-x" * (SIZE // 7)),
    "a name in a form": lambda: _part("x" * SIZE, b"x"),
    "128 files in a form": lambda: _many_parts(PNG + _noise(SIZE // 128), 128),
    "16 files in a form": lambda: _many_parts(PNG + _noise(SIZE // 16), 16),
    "a long boundary": lambda: (f"multipart/form-data; boundary={'-' * 900}", b"\r\n--" + b"-" * SIZE),
    "25 megapixels of PNG": lambda: _picture("PNG", compress_level=1),
    "25 megapixels of JPEG": lambda: _picture("JPEG", quality=60, progressive=True, subsampling=0),
    "25 megapixels of WebP": lambda: _picture("WEBP", quality=60, method=0),
    "ten large pictures": lambda: _json({"prompt": "x [noise]", "n": 10, "size": "1024x1024"}),
    "ten large pictures, streamed": lambda: _json(
        {"prompt": "x [noise]", "n": 10, "size": "1024x1024", "stream": True}
    ),
}
CONNECTIONS: Mapping[str, tuple[int, Callable[[], bytes]]] = {
    "2,000 idle connections": (2000, lambda: b""),
    "2,000 that have asked": (2000, lambda: b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    "200 half-open of 32 KB": (200, lambda: b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 32_000),
    "2,000 half-open of 32 KB": (2000, lambda: b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 32_000),
    "2,000 bodies begun": (2000, lambda: HEAD.format("application/json", SIZE).encode() + b'{"a": "' + b"x" * 60_000),
    "300 bodies half sent": (300, lambda: HEAD.format("application/json", SIZE).encode() + b"x" * 2_000_000),
    "2,000 asked after a body": (2000, lambda: HEAD.format("text/plain", SIZE).encode() + b"x" * 400_000),
}
"""Their number, and what each sends before it is silent, and reads nothing."""
ROUTES: Mapping[str, str] = {"ten large pictures": "generations", "ten large pictures, streamed": "generations"}


def _serve(folder: Path) -> None:
    raise_limit()
    with running(folder, EDIT_SCHEMA) as server:
        print(server.port, flush=True)
        sys.stdin.readline()


def _memory(pid: int, what: str) -> int:
    """Return megabytes of a process: `VmRSS` now, `VmHWM` at most since it was set back."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition(f"{what}:")[2].split()[0]) // 1000


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


def _send(port: int, data: bytes, answers: Counter[str], reads_slowly: bool = False) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", port)) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            answers[sock.recv(4096)[9:12].decode()] += 1
            if reads_slowly:
                time.sleep(SECONDS / 2)


def _hold(port: int, count: int, data: bytes, answers: Counter[str]) -> None:
    """Open connections, send on each what it takes, and be silent until the end."""
    end = time.monotonic() + SECONDS
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.sendall(data)
        answers["connections"] = count
        time.sleep(max(0.0, end - time.monotonic()))


def _attackers(port: int, kind: str, answers: Counter[str]) -> list[threading.Thread]:
    if kind in CONNECTIONS:
        count, data = CONNECTIONS[kind]
        return [threading.Thread(target=_hold, args=(port, count, data(), answers))]
    media_type, body = KINDS[kind]()
    head = HEAD.format(media_type, len(body)).replace("edits", ROUTES.get(kind, "edits"))
    return [
        threading.Thread(target=_send, args=(port, head.encode() + body, answers, kind in ROUTES))
        for _ in range(SENDERS)
    ]


def _measured(pid: int, port: int, kind: str, rest: int) -> str:
    answers = Counter[str]()
    attackers = _attackers(port, kind, answers)
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    asking = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "ask", str(port)], stdout=subprocess.PIPE, text=True
    )
    for each in attackers:
        each.start()
    took = sorted(1000 * seconds for seconds in json.loads(asking.communicate()[0]))
    for each in attackers:
        each.join()
    time.sleep(0.5)
    most, left = _memory(pid, "VmHWM") - rest, _memory(pid, "VmRSS") - rest
    p99 = took[int(0.99 * (len(took) - 1))]
    return f"{kind:30} {statistics.median(took):7.1f} {p99:7.1f} {took[-1]:7.1f} {most:6} {left:6}  {dict(answers)}"


def main() -> None:
    """Measure the kinds that are named, or all."""
    raise_limit()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, "serve", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            port = int(server.stdout.readline())
            _measured(server.pid, port, "nothing", 0)
            rest = _memory(server.pid, "VmRSS")
            for kind in sys.argv[1:] or (*KINDS, *CONNECTIONS):
                print(_measured(server.pid, port, kind, rest), flush=True)
            server.stdin.write("\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["ask"]:
        _ask(int(sys.argv[2]))
    else:
        main()
