"""Attacks of many connections, and of many small requests."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from urllib.parse import quote

from tests.reliability.attack import Attack, Prepared
from tests.reliability.attacker import AT_ONCE, NAP, STATUS, Attacker, form, parts, post, request
from tests.reliability.large_attacks import EDITS, GENERATIONS, png, remember

NUM_IDLE = 2000
LONG = {"prompt": "a cat", "num_inference_steps": 1000}
"""A request that runs for seconds, which nobody waits for."""
ASYNC = {"prefer": "respond-async"}


def nothing(attacker: Attacker) -> Prepared:
    """Do nothing, for as long as an attack is."""
    return lambda: time.sleep(attacker.seconds)


def idle(attacker: Attacker) -> Prepared:
    """Open connections, and say nothing."""
    return lambda: attacker.hold(NUM_IDLE, lambda index: b"", every=0.5)


def half_heads(attacker: Attacker) -> Prepared:
    """Send heads that do not end."""
    opening = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: "
    return lambda: attacker.hold(200, lambda index: opening, b"a", every=0.5)


def churn(attacker: Attacker) -> Prepared:
    """Open connections and reset them, in the middle of a request."""

    def open_and_reset(index: int) -> None:
        while attacker.goes_on:
            with contextlib.suppress(OSError), attacker.connect() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.sendall(post(GENERATIONS, LONG)[: 40 + index * 20])
                attacker.count("reset")

    return lambda: attacker.together(AT_ONCE, open_and_reset)


def small_chunks(attacker: Attacker) -> Prepared:
    """Send bodies in chunks, of a byte and of the least that are taken."""
    head = request("POST", GENERATIONS, transfer_encoding="chunked", content_type="application/json")
    least = b"100\r\n" + b" " * 256 + b"\r\n"
    requests = (head + b"1\r\n \r\n" * 500_000, head + least * 100_000 + b"0\r\n\r\n")
    return lambda: attacker.again_and_again(8, *requests)


def pipelined(attacker: Attacker) -> Prepared:
    """Send a thousand requests before the first answer is read; every second client reads none."""
    data = request("GET", "/v1/models") * 1000 + request("GET", "/openapi.json") * 20

    def send(index: int) -> None:
        while attacker.goes_on:
            with contextlib.suppress(OSError), attacker.connect(1.0) as sock:
                sock.sendall(data)
                if index % 2:
                    time.sleep(1.0)
                    continue
                with sock.makefile("rb") as answers:
                    while attacker.goes_on and (line := answers.readline()):
                        if match := STATUS.search(line):  # it follows a body
                            attacker.count(match[1].decode())

    return lambda: attacker.together(AT_ONCE, send)


def cancelled(attacker: Attacker) -> Prepared:
    """Make jobs and cancel them at once."""
    making = post(GENERATIONS, {**LONG, "prompt": "x" * 8000}, **ASYNC)

    def make_and_cancel(index: int) -> None:
        while attacker.goes_on:
            with contextlib.suppress(OSError), attacker.connect() as sock:
                while attacker.goes_on:
                    sock.sendall(making)
                    if not (answer := attacker.receive(sock)):
                        break
                    if "id" in (job := json.loads(answer)):
                        sock.sendall(request("DELETE", f"/v1/jobs/{job['id']}"))
                        attacker.receive(sock)

    return lambda: attacker.together(AT_ONCE, make_and_cancel)


def full_queue(attacker: Attacker) -> Prepared:
    """Fill the queue and keep it full, with requests that are waited for and with jobs."""
    data, job = post(GENERATIONS, LONG), post(GENERATIONS, LONG, **ASYNC)

    def send(index: int) -> None:
        while attacker.goes_on:
            if index % 4:
                attacker.ask(data)
            else:
                remember(attacker, attacker.ask(job))
            time.sleep(NAP)

    return lambda: attacker.together(64, send)


def finished_job(attacker: Attacker, size: str) -> str:
    """Return the path of a job with a picture of that size, once it has it."""
    fields = {"prompt": "a cat", "size": size, "num_inference_steps": 1}
    answer = attacker.ask(post(GENERATIONS, fields, **ASYNC))
    path = f"/v1/jobs/{json.loads(answer or b'{}')['id']}"
    while json.loads(attacker.ask(request("GET", path)) or b"{}")["state"] != "completed":
        time.sleep(NAP)
    attacker.answers.clear()
    return path


def slow_readers(attacker: Attacker) -> Prepared:
    """Ask for files and for pictures, many at a time, and read nothing of them."""
    path = finished_job(attacker, "2048x2048")
    pictures = {"prompt": "a cat", "n": 4, "size": "1024x1024", "num_inference_steps": 1}
    asked = (
        request("GET", f"{path}/content") * 50,
        post(GENERATIONS, pictures) * 4,
        request("GET", "/openapi.json") * 99,
    )

    def send(index: int) -> None:
        while attacker.goes_on:
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.settimeout(2.0)
                sock.connect(("127.0.0.1", attacker.port))
                sock.sendall(asked[index % len(asked)])
                attacker.count("unread")
                while attacker.goes_on:
                    time.sleep(NAP * 5)

    return lambda: attacker.together(96, send)


def event_streams(attacker: Attacker) -> Prepared:
    """Follow jobs that run, by hundreds of streams."""
    jobs = [json.loads(attacker.ask(post(GENERATIONS, LONG, **ASYNC)) or b"{}") for _ in range(8)]
    for job in jobs:
        remember(attacker, json.dumps(job).encode())
    attacker.answers.clear()

    def follow() -> None:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(attacker.connect()) for _ in range(300)]
            for index, sock in enumerate(socks):
                sock.sendall(request("GET", f"/v1/jobs/{jobs[index % len(jobs)]['id']}/events"))
                sock.setblocking(False)
            while attacker.goes_on:
                for sock in socks:
                    with contextlib.suppress(BlockingIOError):
                        data = sock.recv(1 << 20)
                        attacker.count("events", data.count(b"event: "))
                        attacker.count("200", data.count(b"HTTP/1.1 200 "))
                time.sleep(NAP)

    return follow


def foreign(attacker: Attacker) -> Prepared:
    """Ask as pages of other sites make a browser ask."""
    text = {"content_type": "text/plain"}
    requests = [
        request("GET", "/v1/models", host="evil.example"),
        request("GET", "/v1/models", sec_fetch_site="cross-site"),
        post(GENERATIONS, LONG, host="evil.example:8000"),
        post(GENERATIONS, LONG, origin="https://evil.example"),
        post(GENERATIONS, LONG, sec_fetch_site="cross-site", **text),
        request("GET", "/v1/models", host="127.0.0.1.evil.example"),
        request("OPTIONS", GENERATIONS, origin="https://evil.example", access_control_request_method="POST"),
    ]
    return lambda: attacker.flood(lambda index: requests[index % len(requests)])


def ids_and_keys(attacker: Attacker) -> Prepared:
    """Guess ids and signatures, and give every request a new key."""

    def following(index: int) -> bytes:
        word = secrets.token_hex(16)
        return (
            request("GET", f"/v1/jobs/{word}"),
            request("DELETE", f"/v1/jobs/img_{word}"),
            request("GET", f"/v1/jobs/{word}/content?index=0&expires=99999999999&signature={word}"),
            request("GET", f"/v1/videos/{word * 100}"),
            post(GENERATIONS, {"prompt": "x", "n": 0}, idempotency_key=word * 7, **ASYNC),
            post(GENERATIONS, {"prompt": word, "num_inference_steps": 1}, idempotency_key="one", **ASYNC),
            post(GENERATIONS, {"prompt": "x", "num_inference_steps": 1}, idempotency_key=word, **ASYNC),
        )[index % 7]

    return lambda: attacker.flood(following)


def many_headers(attacker: Attacker) -> Prepared:
    """Send as many headers as are taken, and more, and larger ones."""
    requests = [
        request("GET", "/livez", b"", **{f"a{index}": "b" * 250 for index in range(98)}),
        request("GET", "/livez", b"", **{f"a{index}": "b" for index in range(5000)}),
        request("GET", "/livez", a="b" * 200_000),
        request("GET", "/livez", b"", **{"a" * 30_000: "b"}),
        request("GET", "/" + quote("<a" * 10_000)),
    ]
    return lambda: attacker.flood(lambda index: requests[index % len(requests)])


def ranges(attacker: Attacker) -> Prepared:
    """Ask for one file in 2,000 parts, in all the ways in which one can."""
    path = f"{finished_job(attacker, '1024x1024')}/content"
    asked = [",".join(f"{at}-{at + 1}" for at in range(2000)), "0-,0-,0-,0-", "0-0", "-1", f"{10**18}-", "0-" * 9000]
    requests = [request("GET", path, range=f"bytes={text}") for text in asked]
    requests += [request("GET", path), request("GET", path, range="bytes=" + "," * 20_000)]
    return lambda: attacker.flood(lambda index: requests[index % len(requests)])


def costly_answers(attacker: Attacker) -> Prepared:
    """Ask for what takes the longest to say."""
    paths = ["/openapi.json", "/v1/models/model/schema", "/metrics", "/v1/videos?limit=100", "/readyz", "/nothing"]
    return lambda: attacker.flood(lambda index: request("GET", paths[index % len(paths)]))


def small_pictures(attacker: Attacker) -> Prepared:
    """Send small requests of every kind that is refused late."""
    requests = [
        form(EDITS, parts([("prompt", b"x"), ('image"; filename="a', png(64, 64))])),
        post(GENERATIONS, {"prompt": "x", "size": "65536x65536"}),
        post(GENERATIONS, {"prompt": "x" * 9000}),
        post(GENERATIONS, {"prompt": "x", **{f"a{index}": 1 for index in range(5000)}}),
        post(EDITS, {"prompt": "x", "images": [{"image_url": "data:,x"}] * 5000}),
        post(GENERATIONS, {"prompt": "x", "seed": int("9" * 39)}),
    ]
    return lambda: attacker.flood(lambda index: requests[index % len(requests)])


def watch_ends(attacker: Attacker) -> Prepared:
    """Send requests that run, and leave."""

    def send(index: int) -> None:
        while attacker.goes_on:
            with contextlib.suppress(OSError), attacker.connect() as sock:
                sock.sendall(post(GENERATIONS, {**LONG, "stream": bool(index % 2)}))
                time.sleep(NAP)
                attacker.count("left")

    return lambda: attacker.together(AT_ONCE, send)


SMALL_ATTACKS: Mapping[str, Attack] = {
    "nothing": Attack("nothing", nothing, frozenset()),
    "idle connections": Attack(
        f"{NUM_IDLE:,} connections that say nothing",
        idle,
        frozenset(),
        {"open at once": NUM_IDLE},
        times=2.0,
    ),
    "half heads": Attack(
        "200 heads that never end, a byte each half second",
        half_heads,
        frozenset({"408"}),
        {"408": 40},
        times=2.5,
    ),
    "resets": Attack(
        "sixteen at once: connections that are reset in a request",
        churn,
        frozenset(),
        {"reset": 100},
    ),
    "small chunks": Attack(
        "eight at once: bodies in chunks of 1 byte, and of 256",
        small_chunks,
        frozenset({"400", "413"}),
        {"400": 2},
    ),
    "pipelining": Attack(
        "sixteen at once: a thousand requests before an answer is read",
        pipelined,
        frozenset({"200"}),
        {"200": 200},
    ),
    "cancelled jobs": Attack(
        "sixteen at once: jobs with a prompt of 8 KB, made and cancelled",
        cancelled,
        frozenset({"202", "200", "429"}),
        {"202": 20},
    ),
    "a full queue": Attack(
        "64 clients of one address: requests and jobs that take seconds",
        full_queue,
        frozenset({"200", "202", "429"}),
        {"429": 20},
    ),
    "left requests": Attack(
        "sixteen at once: requests whose client leaves",
        watch_ends,
        frozenset(),
        {"left": 100},
    ),
    "slow readers": Attack(
        "96 clients that ask for megabytes and read nothing",
        slow_readers,
        frozenset(),
        {"unread": 96},
    ),
    "event streams": Attack(
        "300 streams that follow eight jobs",
        event_streams,
        frozenset({"200"}),
        {"200": 300, "events": 300},
    ),
    "other sites": Attack(
        "sixteen at once: requests that pages of other sites make",
        foreign,
        frozenset({"403", "415"}),
        {"403": 200},
    ),
    "ids and keys": Attack(
        "sixteen at once: guessed ids and signatures, new idempotency keys",
        ids_and_keys,
        frozenset({"400", "403", "404", "409", "202", "429"}),
        {"404": 20, "202": 5},
    ),
    "headers": Attack(
        "sixteen at once: 5,000 headers, or 200 KB of one",
        many_headers,
        frozenset({"200", "404", "431"}),
        {"431": 50},
    ),
    "ranges": Attack(
        "sixteen at once: a file in 2,000 ranges",
        ranges,
        frozenset({"200", "206", "400", "416", "431"}),
        {"400": 20},
    ),
    "costly answers": Attack(
        "sixteen at once: descriptions, metrics, lists, readiness",
        costly_answers,
        frozenset({"200", "404", "400"}),
        {"200": 50},
    ),
    "late refusals": Attack(
        "sixteen at once: small requests with a fault that is found late",
        small_pictures,
        frozenset({"400"}),
        {"400": 20},
    ),
}
