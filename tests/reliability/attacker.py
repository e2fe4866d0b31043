"""What every attack on a server is made of: connections, threads, answers that are counted, and an end that comes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HOST = "127.0.0.1"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")
PATIENCE = 20.0
"""Seconds for one answer."""
LEAVING = 2.0
"""For answers that are still to come when an attack is over."""
AT_ONCE = 16
"""Connections of a flood of small requests: what the event loop has before it when somebody asks how it is."""
NAP = 0.02


def request(method: str, path: str, body: bytes = b"", /, **headers: str) -> bytes:
    """Return a request; `_` in the name of a header is `-`."""
    usual = {"content-type": "application/json", "content-length": str(len(body))} if body else {}
    given = {"host": "localhost", **usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def post(path: str, fields: object, **headers: str) -> bytes:
    """Return a request with JSON."""
    return request("POST", path, json.dumps(fields, ensure_ascii=False).encode(), **headers)


@dataclass
class Attacker:
    """One process that attacks.

    Attributes:
        port: of the server, on this machine.
        seconds: that the attack goes on.
        answers: the statuses that came, and other marks of what happened, counted.
        afterwards: requests that are sent when it is over.

    """

    port: int
    seconds: float
    answers: Counter[str] = field(default_factory=Counter)
    afterwards: list[bytes] = field(default_factory=list)
    _end: float = float("inf")

    def run(self, attack: Callable[[], None]) -> None:
        """Attack, from now to the end."""
        self._end = time.monotonic() + self.seconds
        attack()
        for data in self.afterwards:
            self.ask(data)

    @property
    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self._end

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        """Return a connection."""
        return socket.create_connection((HOST, self.port), timeout=timeout)

    def count(self, mark: str, number: int = 1) -> None:
        """Count what happened."""
        self.answers[mark] += number

    def receive(self, sock: socket.socket) -> bytes | None:
        """Return the body of an answer that has a length, counted by its status; None where none came."""
        data = b""
        try:
            while b"\r\n\r\n" not in data:
                if not (more := sock.recv(1 << 16)):
                    raise ConnectionError
                data += more
            head, _, body = data.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            left = int(length[1]) - len(body) if length else 0
            while left > 0 and (more := sock.recv(1 << 16)):
                body, left = body + more, left - len(more)
        except TimeoutError:
            self.count("unanswered")
            return None
        except OSError:
            self.count("closed")
            return None
        status = STATUS.match(head)
        self.count(status[1].decode() if status else "no HTTP")
        return body

    def ask(self, data: bytes) -> bytes | None:
        """Send a request on a connection of its own; return the body of its answer, if there is one."""
        try:
            with self.connect() as sock:
                with contextlib.suppress(ConnectionError):  # it may be answered before it was sent
                    sock.sendall(data)
                return self.receive(sock)
        except OSError:
            self.count("closed")
            return None

    def together(self, number: int, call: Callable[[int], None]) -> None:
        """Call in so many threads, each with its number, and wait for them; not long for answers after the end."""
        threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(number)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(max(0.0, self._end + LEAVING - time.monotonic()))

    def again_and_again(self, number: int, *requests: bytes) -> None:
        """Send requests, each on a new connection, by so many at once, until the end."""

        def send(index: int) -> None:
            while self.goes_on:
                self.ask(requests[index % len(requests)])
                index += 1

        self.together(number, send)

    def flood(self, following: Callable[[int], bytes], number: int = AT_ONCE) -> None:
        """Send one request after another on each of so many connections, until the end.

        Args:
            following: returns the next request, from a number that no other has.
            number: of connections.

        """

        def send(index: int) -> None:
            while self.goes_on:
                with contextlib.suppress(OSError), self.connect() as sock:
                    while self.goes_on:
                        sock.sendall(following(index))
                        index += number
                        if self.receive(sock) is None:
                            break

        self.together(number, send)

    def hold(self, number: int, opening: Callable[[int], bytes], drip: bytes = b"", every: float = 1.0) -> None:
        """Keep so many connections open until the end; whichever the server closes is opened again.

        Args:
            number: of them.
            opening: what each sends when it is open, from its number.
            drip: what each sends after that, again and again.
            every: seconds between two of these.

        """
        held: dict[int, socket.socket] = {}
        try:
            while self.goes_on:
                began = time.monotonic()
                for index in range(number):
                    if not self.goes_on:
                        return
                    self._keep(held, index, opening, drip)
                self.answers["open at once"] = max(self.answers["open at once"], len(held))
                time.sleep(max(NAP, every - (time.monotonic() - began)))
        finally:
            for sock in held.values():
                sock.close()

    def _keep(self, held: dict[int, socket.socket], index: int, opening: Callable[[int], bytes], drip: bytes) -> None:
        """Open a connection, or look after one."""
        if index in held and self._is_over(held[index]):
            held.pop(index).close()
        try:
            if index in held:
                held[index].sendall(drip)
                return
            held[index] = self.connect(5.0)
            held[index].sendall(opening(index))
        except OSError:
            if (sock := held.pop(index, None)) is not None:
                self._is_over(sock)
                sock.close()
            self.count("closed")

    def _is_over(self, sock: socket.socket) -> bool:
        """Say whether the server has answered or closed, and count how."""
        sock.setblocking(False)
        try:
            data = sock.recv(1 << 12)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        finally:
            sock.settimeout(5.0)
        status = STATUS.match(data)
        self.count(status[1].decode() if status else "closed")
        return True


def main_of(attacker: Attacker, prepare: Callable[[Attacker], Callable[[], None]]) -> None:
    """Prepare, say so, wait for a line, attack, and print what came of it. For a process of its own.

    It asks for little of the processors, so that the server and whoever asks it wait for the server and not for this.
    """
    os.nice(NICE)
    attack = prepare(attacker)
    print("ready", flush=True)
    input()
    attacker.run(attack)
    print(json.dumps(attacker.answers), flush=True)
    os._exit(0)  # threads may wait for answers still


NICE = 10


def parts(named: Sequence[tuple[str, bytes]], boundary: bytes = b"b") -> bytes:
    """Return the body of a form; a name may go on with the parameter of a file: `image"; filename="a`."""
    lines = [
        b'--%s\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (boundary, name.encode(), data)
        for name, data in named
    ]
    return b"".join(lines) + b"--%s--\r\n" % boundary


def form(path: str, body: bytes, **headers: str) -> bytes:
    """Return a request with a form."""
    return request("POST", path, body, content_type="multipart/form-data; boundary=b", **headers)
