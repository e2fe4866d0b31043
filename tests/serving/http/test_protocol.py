"""Clients that are slow, broken or malicious below the level of HTTP's meaning, and what they do to the others."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import statistics
import time

import pytest

from safelight.serving.limits import Limits
from tests.serving.http_server import PROMPT, next_answer, read_answer, running

LIMITS = Limits(body_bytes=1 << 20, header_seconds=0.3, request_seconds=0.6, stalled_seconds=0.8, ping_seconds=0.05)
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BODY = b'{"prompt": "x", "seed": 1}'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("http"), limits=LIMITS) as server:
        yield server


@pytest.fixture(autouse=True)
def control(server):
    """Whatever the test did, the next client is served."""
    yield
    answer = server.raw(POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    assert answer[0] == 200


def assert_form(answer, status, code):
    assert answer[0] == status, answer
    assert answer[2]["error"]["code"] == code and set(answer[2]["error"]) == {"message", "type", "param", "code"}
    assert answer[1]["x-request-id"].startswith("req_") and answer[1]["content-type"] == "application/json"


def assert_closed(sock, within):
    began = time.monotonic()
    sock.settimeout(within + 5)
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    assert time.monotonic() - began < within


MALFORMED = {
    "junk": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n",
    "no version": b"GET /livez\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "a space in a header": b"GET /livez HTTP/1.1\r\nhost: localhost\r\na b: c\r\n\r\n",
    "NUL in a header": b"GET /livez HTTP/1.1\r\nhost: localhost\r\na: \0\r\n\r\n",
    "a folded method": b"G\rT /livez HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "a length that is none": POST + b"content-length: abc\r\n\r\n",
    "a negative length": POST + b"content-length: -1\r\n\r\n",
    "a length with a sign": POST + b"content-length: +5\r\n\r\n",
    "two lengths": POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    "an unknown coding": POST + b"transfer-encoding: gzip\r\n\r\n",
    "a chunk that is none": POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    "chunks of one byte": POST + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_http(server, data):
    answer = server.raw(data)
    assert answer[0] in (400, 501), answer
    assert_form(answer, answer[0], "malformed_request")


def test_a_body_that_is_also_chunked_is_not_two_requests(server):
    """Which of the two lengths counts must not be a matter of taste."""
    coded, sized = b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for heads in (coded + sized, sized + coded, b"Content-Length: %d\r\nTRANSFER-ENCODING: chunked\r\n" % len(chunks)):
        with server.connect(POST + heads + b"\r\n" + chunks + GET) as sock, sock.makefile("rb") as file:
            assert_form(next_answer(file), 400, "malformed_request")
            assert next_answer(file)[0] == 0, "nothing of what follows is a request"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /livez HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 30_000 + b"\r\n",
        b"GET /livez?" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * 200_000,
        b"x" * 200_000,
    ],
    ids=["value", "number", "target", "no end", "no line"],
)
def test_200_kb_of_headers(server, data):
    answer = server.raw(data)
    assert_form(answer, 431, "headers_too_large")


@pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["crlf", "lf"])
@pytest.mark.parametrize("count", [99, 100, 10_000])
def test_the_number_of_headers(server, count, end):
    """Of any name and length, in one piece or in many."""
    lines = ["GET /livez HTTP/1.1", "host: localhost", *(["a:"] * (count - 1))]
    data = (end.join(lines) + 2 * end).encode()
    if count <= 100:
        assert server.raw(data)[0] == 200
    else:
        assert_form(server.raw(data), 431, "headers_too_large")
    with server.connect() as sock:
        with contextlib.suppress(ConnectionError):  # it may be refused before all of it is sent
            for at in range(0, min(len(data), 2000), 300):
                sock.sendall(data[at : at + 300])
        assert read_answer(sock)[0] == (200 if count <= 100 else 431)


REFUSED = {
    "headers": (GET[:-2] + b"a: b\r\n" * 101, 431),
    "junk": (b"\x16\x03\x01\r\n\r\n", 400),
    "a length that is none": (POST + b"content-length: abc\r\n\r\n", 400),
    "a chunk that is none": (POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
    "after an answer": (GET + b"\0\r\n\r\n", 400),
}


@pytest.mark.parametrize("data, status", REFUSED.values(), ids=REFUSED)
def test_a_client_that_still_sends_reads_why_it_was_refused(server, data, status):
    """A connection that is closed with bytes unread is reset: those in the midst of sending see that alone."""
    with server.connect(data) as sock:
        time.sleep(0.05)
        for _ in range(20):
            sock.sendall(b"x" * 1000)
            time.sleep(0.002)
        with sock.makefile("rb") as file:
            answer = next_answer(file)
            if data.startswith(GET):
                assert answer[0] == 200
                answer = next_answer(file)
            assert answer[0] == status
            assert file.read() == b""
    server.until(lambda: server.num_connections() == 0)


def test_what_is_refused_is_not_read_for_ever(server):
    """Neither of a client that sends no more, nor of one that never stops."""
    with server.connect(b"junk\r\n\r\n") as sock:
        assert read_answer(sock)[0] == 400
        server.until(lambda: server.num_connections() == 0)
    with server.connect(b"junk\r\n\r\n") as sock, pytest.raises(ConnectionError):
        for _ in range(64):
            sock.sendall(b"x" * LIMITS.body_bytes)


def test_many_trailers(server):
    """They are headers, at the other end."""
    head = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    assert server.raw(head + b"a: b\r\n" * 100 + b"\r\n")[0] == 200
    for trailers in (b"a: b\r\n" * 2000, b"a: b\r\n" * 101, b"a: " + b"b" * (LIMITS.header_bytes + 1) + b"\r\n"):
        with server.connect(head + trailers + b"\r\n") as sock:
            assert_form(read_answer(sock), 431, "headers_too_large")
            assert_closed(sock, 2)


def test_large_headers_in_one_piece(server):
    """Half as much as h11 looks at in one piece is let through by h11 alone, if it comes at once."""
    data = b"GET /livez HTTP/1.1\r\nhost: localhost\r\na: " + b"x" * (LIMITS.header_bytes + 1000) + b"\r\n\r\n"
    assert_form(server.raw(data), 431, "headers_too_large")


@pytest.mark.parametrize("length", [2**63, 10**19, LIMITS.body_bytes + 1])
def test_a_length_that_is_too_much_is_refused_before_the_body(server, length):
    began = time.monotonic()
    answer = server.raw(POST + b"content-length: %d\r\n\r\n" % length)
    assert_form(answer, 413, "too_large")
    assert time.monotonic() - began < LIMITS.request_seconds


def test_the_rest_of_a_refused_body_is_bounded(server):
    """It is read, so that its sender hears the answer; but not for ever."""
    with server.connect(POST + b"content-length: %d\r\n\r\n" % 10**12) as sock:
        assert read_answer(sock)[0] == 413
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                sock.sendall(b"x" * (1 << 20))
                sent += 1
        assert sent < 100


def test_a_body_longer_than_its_length(server):
    request = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY + b"more of it\r\n\r\n"
    with server.connect(request) as sock, sock.makefile("rb") as file:
        assert [next_answer(file)[0], next_answer(file)[0]] == [200, 400]


def test_a_body_shorter_than_its_length(server):
    with server.connect(POST + b"content-length: 100\r\n\r\n{}") as sock:
        sock.shutdown(socket.SHUT_WR)
        assert_form(read_answer(sock), 400, "malformed_request")
    with server.connect(POST + b"content-length: 100\r\n\r\n{}") as sock:
        assert_form(read_answer(sock), 408, "request_timeout")


def test_headers_that_end_early(server):
    with server.connect(POST) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert_form(read_answer(sock), 400, "malformed_request")


def test_headers_have_a_deadline(server):
    with server.connect(POST) as sock:
        began = time.monotonic()
        assert_form(read_answer(sock), 408, "request_timeout")
        assert LIMITS.header_seconds * 0.8 < time.monotonic() - began < LIMITS.header_seconds + 1
    with server.connect() as sock:  # no byte at all: nobody to answer
        assert read_answer(sock)[0] == 0


@pytest.mark.parametrize("opening", [b"", POST + b"content-length: 1000\r\n\r\n"], ids=["headers", "body"])
def test_a_byte_now_and_then_does_not_prolong_it(server, opening):
    began = time.monotonic()
    with server.connect(opening) as sock:
        while not select.select([sock], [], [], 0.02)[0]:
            assert time.monotonic() - began < LIMITS.request_seconds + 1
            sock.sendall(b"x")
        assert_form(read_answer(sock), 408, "request_timeout")


def test_the_second_request_of_a_connection_has_deadlines_too(server):
    with server.connect(GET) as sock:
        assert read_answer(sock)[0] == 200
        sock.sendall(POST)
        assert_form(read_answer(sock), 408, "request_timeout")


def test_a_requests_time_begins_with_its_first_byte(tmp_path):
    """Not with the connection's, nor with the end of a body that was refused on it."""
    limits = Limits(body_bytes=1000, header_seconds=5.0, request_seconds=0.5)
    request = POST + b"content-length: %d\r\n\r\n" % len(BODY)
    with running(tmp_path, limits=limits) as server, server.connect() as sock, sock.makefile("rb") as file:
        for opening in (b"", POST + b"content-length: 2000\r\n\r\n"):
            sock.sendall(opening)
            assert not opening or next_answer(file)[0] == 413
            sock.sendall(b" " * 2000 if opening else b"")
            time.sleep(1.0)
            sock.sendall(request)
            time.sleep(0.1)
            sock.sendall(BODY)
            assert next_answer(file)[0] == 200


def test_a_connection_is_kept(server):
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(GET)
            assert read_answer(sock)[0] == 200
            sock.sendall(b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert read_answer(sock)[0] == 404
        sock.sendall(GET * 5)
        time.sleep(LIMITS.header_seconds * 2)  # the deadline of none of them is that of an idle connection
        sock.sendall(GET)
        with sock.makefile("rb") as file:
            assert file.read(200).startswith(b"HTTP/1.1 200")


def test_a_request_that_runs_has_no_deadline_here(server):
    prompt = b'{"prompt": "[hold]"}'
    with server.connect(POST + b"content-length: %d\r\n\r\n" % len(prompt) + prompt) as sock:
        time.sleep(LIMITS.request_seconds + LIMITS.stalled_seconds + 0.5)
        server.call(server.engine.release)
        assert read_answer(sock)[0] == 200


def test_a_request_behind_another_is_not_late(tmp_path):
    """Its time begins when the one before it has been answered: until then it is we who do not read."""
    first, second = b'{"prompt": "[hold]"}', BODY + b" " * 1000
    with running(tmp_path, limits=LIMITS) as server, server.connect() as sock:
        sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(first) + first)
        server.until(lambda: server.engine.stats.num_running == 1)
        sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(second) + BODY)
        time.sleep(LIMITS.request_seconds * 1.5)
        server.call(server.engine.release)
        with sock.makefile("rb") as file:
            assert next_answer(file)[0] == 200
            sock.sendall(b" " * 1000)
            assert next_answer(file)[0] == 200


def test_a_reader_that_takes_nothing_is_dropped(server):
    """It asked for more than all buffers on its way hold, and reads none of it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "[noise]", "size": "2048x2048", "n": 2}'
        sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        server.until(lambda: server.num_connections() >= 1)
        server.until(lambda: server.num_connections() == 0)


def test_a_slow_reader_is_served(server):
    body = b'{"prompt": "[noise]", "size": "1024x1024"}'
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        began, taken = time.monotonic(), 0
        while data := sock.recv(1 << 15):
            taken += len(data)
            if time.monotonic() - began < 2 * LIMITS.stalled_seconds:
                time.sleep(0.01)
        assert taken > 3 * (1 << 20)


@contextlib.contextmanager
def half_open(server, count):
    with contextlib.ExitStack() as stack:
        for number in range(count):
            opening = (b"", b"GET /livez HT", POST, POST + b"content-length: 99\r\n\r\n{")[number % 4]
            stack.enter_context(server.connect(opening))
        yield


def test_200_half_open_sockets_harm_nobody(tmp_path):
    with running(tmp_path) as server, half_open(server, 200), server.http() as http:
        server.until(lambda: server.num_connections() >= 200)
        times = []
        for _ in range(200):
            began = time.perf_counter()
            assert http.get("/livez").status_code == 200
            times.append(time.perf_counter() - began)
        assert statistics.median(times) < 0.1  # what the slowest take is measured by `make test-attacks`
        assert http.post("/v1/images/generations", json={"prompt": PROMPT}).status_code == 200


def test_half_open_sockets_are_closed(server):
    with half_open(server, 40):
        server.until(lambda: server.num_connections() >= 40)
        server.until(lambda: server.num_connections() == 0, LIMITS.request_seconds + 2)


def test_silent_streams_have_comments(tmp_path):
    body = b'{"prompt": "[hold]", "stream": true}'
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    with running(tmp_path, limits=LIMITS) as server, server.connect(request) as sock, sock.makefile("rb") as file:
        assert file.readline().startswith(b"HTTP/1.1 200")
        assert b": ping\n" in iter(file.readline, b"")
        server.call(server.engine.release)
        assert b"event: image_generation.completed\n" in iter(file.readline, b"")


def test_32_mib_of_junk_do_not_hold_the_others(tmp_path):
    """While bodies are parsed that are as bad as they can be, the event loop goes on."""
    with running(tmp_path) as server, server.http() as http:
        longest = []
        kinds = {b"[": 400, b"\\u0041": 400, b'{"a":': 400, b"1": 413}
        for unit, status in kinds.items():
            junk = unit * ((31 << 20) // len(unit))
            body = b'{"prompt": "' + junk if junk[:1] == b"\\" else junk
            with server.connect(POST + b"content-length: %d\r\n\r\n" % len(body)) as sock:
                sock.sendall(body)
                while True:
                    began = time.perf_counter()
                    assert http.get("/livez").status_code == 200
                    longest.append(time.perf_counter() - began)
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        assert b" %d " % status in sock.recv(1 << 16)
                        break
        assert max(longest) < 0.5


SLOW = Limits(body_seconds=1.0, body_rate=100_000, request_seconds=20, held_bytes=8 << 20)


def large(size):
    return POST + b"content-length: %d\r\n\r\n" % size


@pytest.mark.parametrize("sent", [0, 900_000])
def test_a_body_that_stops_is_late_whatever_came_before(tmp_path, sent):
    with running(tmp_path, limits=SLOW) as server, server.connect(large(1 << 20) + b" " * sent) as sock:
        began = time.monotonic()
        assert_form(read_answer(sock), 408, "request_timeout")
        assert_closed(sock, 2)
        assert time.monotonic() - began < 5


def test_a_body_has_a_least_rate(tmp_path):
    """A byte now and then is as good as none; twice the rate is enough, however long it takes."""
    with running(tmp_path, limits=SLOW) as server:
        with server.connect(large(1 << 20)) as sock:
            sock.settimeout(0.02)
            began, answer = time.monotonic(), b""
            while not answer and time.monotonic() - began < 10:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(b" ")
                    answer = sock.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408")
        size = 300_000
        with server.connect(large(size)) as sock:
            for _ in range(29):
                sock.sendall(b" " * 10_000)
                time.sleep(0.05)
            sock.sendall(BODY.rjust(10_000))
            assert read_answer(sock)[0] == 200


def test_stalled_bodies_leave_room_and_go(tmp_path):
    """As many large bodies as fit, none of which goes on: small ones are taken meanwhile, large ones soon."""
    size = SLOW.small_body_bytes
    limits = dataclasses.replace(SLOW, body_seconds=1.5)
    with running(tmp_path, limits=limits) as server, contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(server.connect(large(8 << 20) + b" " * (size + 1))) for _ in range(12)]
        assert stalled
        whole = large(2 * size) + BODY.rjust(2 * size)
        end = time.monotonic() + 10
        while server.raw(whole)[0] != 429:
            assert time.monotonic() < end
        for length in (len(BODY), size // 4):
            assert server.raw(large(length) + BODY.rjust(length))[0] == 200
        time.sleep(limits.body_seconds)
        while server.raw(whole)[0] != 200:
            assert time.monotonic() < end, "what stalls is held until its request's time has ended"
