"""A child process: long words made to hurt, sent to every place that takes a client's words, and what each costs.

`python -m tests.serving.hostile_words FOLDER LENGTH` serves here, and prints a line of JSON for each place and
word: the seconds of processor time of one request with the word at half that length, and at its whole. Whoever starts
it sets a hard limit on its processor time: one expression that backtracks is the end of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from tests.serving.http_server import running
from tests.serving.stub_engine import EDIT_SCHEMA, VIDEO_SCHEMA

WORDS: Mapping[str, tuple[str, str, str]] = {
    "letters": ("<a", "a", ""),
    "dots": ("<a", ".", " at 0x"),
    "opened": ("", "<", ""),
    "objects": ("<", "a at 0x", ""),
    "closed objects": ("", "<a at 0xf>", ""),
    "comments": ("", "<!---->", ""),
    "brackets": ("a", "[]", "!"),
    "nested": ("a", "[a", ""),
    "quotes": ("data:", '"', ""),
    "quoted": ("data:", '""', ";base64"),
    "backslashes": ('"', "\\", '"'),
    "parameters": ("a", ";a=b", ""),
    "escapes": ("data:,", "%41", ""),
    "words": ("", "=?utf-8?b?", ""),
    "slashes": ("", "/", "!"),
    "commas": ("", ",", "!"),
    "spaces": ("a", " ", "\x7f"),
    "digits": ("", "1", "x"),
    "digits and points": ("", "1.", "x"),
    "base64": ("", "QUJD", "!"),
    "known": ("", "prompt", ""),
    "dashes": ("a", "--", "\x7f"),
}
"""How a word begins, what it repeats, and how it ends."""
IN_A_HEAD = 28_000
"""Bytes of a word in a request's line or headers, which have a bound of their own."""
HEADERS = (
    *("range", "prefer", "if-range", "idempotency-key", "authorization", "content-type", "content-encoding", "accept"),
    *("origin", "host", "x-forwarded-for", "sec-fetch-site", "access-control-request-headers", "expect", "upgrade"),
    *("transfer-encoding", "content-length", "connection", "cookie", "referer"),
)
PROMPT_PART = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--b\r\n'
HEAD_PLACES: Mapping[str, str] = {
    "query's name": "GET /v1/videos?{quoted}=1",
    "query": "GET /v1/videos?{quoted}",
    "limit": "GET /v1/videos?limit={quoted}",
    "order": "GET /v1/videos?order={quoted}",
    "after": "GET /v1/videos?after={quoted}",
    "signature": "GET /v1/jobs/x/content?expires={quoted}&signature={quoted}",
    "index": "GET /v1/jobs/x/content?index={quoted}",
    "path": "GET /{quoted}",
    "id": "GET /v1/jobs/{quoted}",
    "video": "DELETE /v1/videos/{quoted}",
    "model's path": "GET /v1/models/{quoted}",
    "model's schema": "GET /v1/models/{quoted}/schema",
    "authority": "GET http://{quoted}/livez",
}


def word(kind: str, length: int) -> str:
    """Return a word of about that length."""
    begin, repeated, end = WORDS[kind]
    return begin + repeated * (length // len(repeated)) + end


def heads(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield requests whose word is in their line or their headers."""
    for place, line in HEAD_PLACES.items():
        cut = quote(text, safe="/<>[];=,.!-")[:IN_A_HEAD]
        yield place, f"{line.format(quoted=cut)} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    plain = text.replace("\x7f", "\x01")[:IN_A_HEAD].encode()
    for name in HEADERS:
        host = b"" if name == "host" else b"host: localhost\r\n"
        begin = b"POST /v1/videos" if name.startswith(("content", "transfer", "idem")) else b"GET /v1/jobs/x/content"
        yield f"{name}:", begin + b" HTTP/1.1\r\n" + host + name.encode() + b": " + plain + b"\r\n\r\n"
    yield "a header's name", b"GET / HTTP/1.1\r\nhost: localhost\r\n" + plain + b": a\r\n\r\n"
    yield "the method", plain + b" / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(path: str, media_type: str, body: bytes) -> bytes:
    """Return a request with a body."""
    lines = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return lines.encode() + body


def bodies(text: str, path: str, names: tuple[str, ...], forms: bool) -> Iterator[tuple[str, bytes]]:
    """Yield requests whose word is in their body: as each field's value, as a name, and in what surrounds a part."""
    prompt: dict[str, object] = {"prompt": "x"}
    values: dict[str, dict[str, object]] = {name: {**prompt, name: text} for name in names}
    values |= {f"a list of {name}": {**prompt, name: [text, [text]]} for name in names}
    values |= {f"an object of {name}": {**prompt, name: {text: text, "image_url": text}} for name in names}
    values |= {"a name": {**prompt, text: 1}, "an escaped name": {**prompt, f"é{text}": 1}}
    for place, fields in values.items():
        yield f"{place} in JSON", post(path, "application/json", json.dumps(fields).encode())
    yield "a damaged body", post(path, "application/json", text.encode())
    if not forms:
        return
    kind, end, data = "multipart/form-data; boundary=b", b"\r\n--b--\r\n", text.replace("\x7f", "").encode()
    for place, head in {
        "a part's name": b'content-disposition: form-data; name="%s"' % data.replace(b'"', b'\\"'),
        "a part's bare name": b"content-disposition: form-data; name=%s" % data,
        "a file's name": b'content-disposition: form-data; name="image"; filename="%s"' % data,
        "a disposition": b"content-disposition: %s" % data,
        "a part's type": b'content-disposition: form-data; name="image"\r\ncontent-type: %s' % data,
        "a part's coding": b'content-disposition: form-data; name="a"\r\ncontent-transfer-encoding: %s' % data,
        "a part's header": b"%s: a" % data,
    }.items():
        yield place, post(path, kind, PROMPT_PART + head + b"\r\n\r\nx" + end)
    for name in names:
        head = f'content-disposition: form-data; name="{name}"'.encode()
        yield f"{name} in a form", post(path, kind, PROMPT_PART + head + b"\r\n\r\n" + text.encode() + end)
        file = head + b'; filename="a"'
        yield f"{name} as a file", post(path, kind, PROMPT_PART + file + b"\r\n\r\n" + text.encode() + end)
    yield (
        "a boundary",
        post(path, f"multipart/form-data; boundary={text.encode('ascii', 'replace')[:9000].decode()}", b""),
    )


def cost(server: object, data: bytes) -> float:
    """Return the seconds of processor time that a request takes, in all threads, until it is answered and closed."""
    began = time.process_time()
    with server.connect() as sock, contextlib.suppress(ConnectionError):  # type: ignore[attr-defined]
        sock.sendall(data.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        while sock.recv(1 << 16):
            pass
    return time.process_time() - began


def main(folder: Path, length: int) -> None:
    """Measure every place with every word."""

    def everything(make: Callable[[str], Iterator[tuple[str, bytes]]], server: object) -> None:
        for kind in WORDS:
            for (place, half), (_, whole) in zip(make(word(kind, length // 2)), make(word(kind, length)), strict=True):
                print(json.dumps([place, kind, cost(server, half), cost(server, whole)]), flush=True)

    names = ("prompt", "model", "n", "size", "quality", "seed", "guidance_scale", "stream", "image", "images", "user")
    with running(folder / "pictures", EDIT_SCHEMA) as server:
        everything(lambda text: bodies(text, "/v1/images/edits", names, forms=True), server)
    with running(folder / "videos", VIDEO_SCHEMA) as server:
        everything(heads, server)
        everything(lambda text: bodies(text, "/v1/videos", ("seconds", "input_reference"), forms=False), server)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
