"""Print the highest memory of a server's process, in KiB: as it started, and after the greediest clients there are."""

from __future__ import annotations

import concurrent.futures
import io
import struct
import tempfile
import zlib
from pathlib import Path

import httpx
from PIL import Image

from tests.serving.http_server import running
from tests.serving.stub_engine import EDIT_SCHEMA


def peak() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmHWM:")[2].split()[0])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def picture_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def post(http: httpx.Client, data: bytes) -> int:
    files = {"image": ("a", data, "image/png")}
    return http.post("/v1/images/edits", data={"prompt": "x", "size": "64x64"}, files=files).status_code


def post_many(http: httpx.Client, picture: bytes, **fields: str) -> httpx.Response:
    """Send sixteen pictures in one form."""
    files = [("image[]", ("a", picture, "image/png"))] * 16
    form = {"prompt": "x", "size": "64x64", **fields}
    return http.post("/v1/images/edits", data=form, files=files, headers={"prefer": "respond-async"}, timeout=120)


def main() -> None:
    """Try one kind of greed after the other: bombs by four clients at once, then what is as large as may be."""
    bombs = [
        png(13_340, 13_340),
        png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (64 << 20)))),
        png(64, 64, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * (64 << 20)))),
        b"RIFF\x1e\0\0\0WEBPVP8L\x12\0\0\0\x2f\xff\xff\xff\x0f" + b"\0" * 13,
    ]
    picture = picture_of(5000, 5000)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), EDIT_SCHEMA) as server, server.http() as http:
        assert post(http, png(64, 64)) == 400
        print(peak())
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for data in bombs:
                assert set(threads.map(post, [http] * 4, [data] * 4)) == {400}
        for _ in range(3):
            assert post(http, picture) == 200
            server.call(server.engine.submitted.clear)
        assert post_many(http, picture).status_code == 400  # this model takes one
        for junk in (b"[" * (31 << 20), b'{"a":' * (6 << 20), b'"' + b"\\u0041" * (5 << 20)):
            headers = {"content-type": "application/json"}
            assert http.post("/v1/images/generations", content=junk, headers=headers).status_code == 400
        print(peak())


if __name__ == "__main__":
    main()
