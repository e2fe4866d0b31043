"""Attacks whose bodies are large, or large once they are looked at: JSON, forms, pictures."""

from __future__ import annotations

import base64
import functools
import io
import json
import random
import struct
import threading
import zlib
from collections.abc import Callable, Mapping

from PIL import Image

from tests.reliability.attack import Attack, Prepared
from tests.reliability.attacker import NAP, Attacker, form, parts, post, request

SIZE = 28_000_000
SENDERS = 8
EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
LARGEST_SIDE = 5000
"""Of a square picture: 25 megapixels, which are all that is taken."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
REFUSED = frozenset({"400", "413", "429"})


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a PNG that says that it is so large, and has no such pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return SIGNATURE + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@functools.cache
def largest() -> bytes:
    """Return the file, of 73 KB, of a picture with as many pixels as are taken."""
    file = io.BytesIO()
    Image.new("RGB", (LARGEST_SIDE, LARGEST_SIDE)).save(file, "PNG")
    return file.getvalue()


def noise(size: int) -> bytes:
    """Return bytes that cannot be compressed."""
    return random.Random(1).randbytes(size)


def field_of(name: str, value: object) -> bytes:
    """Return a request for a picture with one field more."""
    return post(EDITS, {"prompt": "x", name: value})


def junk(body: bytes) -> bytes:
    """Return a request for a picture with any bytes for JSON."""
    return request("POST", GENERATIONS, body)


def text_of(name: str, data: bytes, boundary: bytes = b"b") -> bytes:
    """Return a form whose one part holds that."""
    return request(
        "POST",
        EDITS,
        parts([(name, data)], boundary),
        content_type=f"multipart/form-data; boundary={boundary.decode()}",
    )


def file_of(data: bytes, number: int = 1) -> bytes:
    """Return a form with a picture, so many times."""
    pictures = [('image[]"; filename="a', data)] * number
    return form(EDITS, parts([("prompt", b"x"), ("size", b"64x64"), *pictures]))


def bodies(make: Callable[[], list[bytes]], number: int = SENDERS) -> Callable[[Attacker], Prepared]:
    """Return an attack by so many at once that send these again and again."""

    def prepare(attacker: Attacker) -> Prepared:
        requests = make()
        return lambda: attacker.again_and_again(number, *requests)

    return prepare


def long_texts() -> list[bytes]:
    """Return JSON of few and long texts."""
    return [
        field_of("user", "x" * SIZE),
        field_of("user", "\u00e9" * (SIZE // 2)),
        field_of("user", "\U0001f600" * (SIZE // 4)),
        field_of("prompt", "x" * SIZE),
        junk(b'{"prompt": "x"}'.rjust(SIZE)),
        junk(b"x" * SIZE),
    ]


def many_items() -> list[bytes]:
    """Return JSON of many things, or of one in another in another."""
    return [
        field_of("user", ["x" * 270] * 99_000),
        field_of("user", ["1" * 270] * 49_000 + [{}] * 49_000),
        field_of("user", ("\\" + "x" * 276) * 49_000),
        junk(b"[" * SIZE),
        junk(b'{"a":' * (SIZE // 5)),
        junk(b'"' + b"\\u0041" * (SIZE // 6)),
        junk(b'{"a":' * 90_000 + b" " * (SIZE - 500_000)),
    ]


def data_urls() -> list[bytes]:
    """Return JSON with pictures in data URLs, written as nobody writes them."""
    lines = base64.encodebytes(noise(SIZE * 3 // 4 - 300_000)).decode()
    return [
        field_of("image", "data:," + "%41" * 900_000 + "x" * 20_000_000),
        field_of("image", "data:," + "%4" * 990_000 + "x" * 20_000_000),
        field_of("image", "data:image/png;base64," + lines),
        field_of("image", "data:image/png;base64," + lines.replace("\n", "")),
        field_of("image", "data:" + ";a=b" * 5_000_000 + ",x"),
        field_of("image", "data:," + "x" * SIZE),
    ]


def names_of_32_mb() -> list[bytes]:
    """Return JSON and a form with names as large as a body may be."""
    size = (32 << 20) - 1000
    return [field_of("model", "x" * size), field_of("x" * size, 1), text_of("model", b"x" * size)]


def hyphens() -> list[bytes]:
    """Return forms of what boundaries are made of."""
    return [
        text_of("user", b"\r\n" + b"-" * SIZE),
        text_of("user", b"\r\n--" * (SIZE // 4)),
        text_of("user", b"-\r\n" * (SIZE // 3)),
        text_of("user", b"\r" * SIZE),
    ]


def almost_boundaries() -> list[bytes]:
    """Return forms whose content is the boundary but for its last byte."""
    boundary = b"b" * 60
    return [
        text_of("user", (b"\r\n--" + boundary[:-1]) * (SIZE // 63), boundary),
        text_of('image"; filename="a', (b"\r\n--" + boundary[:-1] + b"c") * (SIZE // 64), boundary),
        text_of("user", boundary[:-1] * (SIZE // 59), boundary),
    ]


def many_parts() -> list[bytes]:
    """Return forms of parts as many as are taken, and of far more."""
    one = b'--b\r\ncontent-disposition: form-data; name="user"\r\n\r\n\r\n'
    return [
        form(EDITS, parts([(f"a{index}", b"x" * (SIZE // 130)) for index in range(128)])),
        form(EDITS, one * (SIZE // len(one)) + b"--b--\r\n"),
        form(EDITS, b"--b\r\n" + b"a: b\r\n" * (SIZE // 6) + b"\r\n--b--\r\n"),
        form(EDITS, parts([('image[]"; filename="a', noise(200_000))] * 128)),
    ]


def marked_up() -> list[bytes]:
    """Return forms with pictures that hold much else than pixels."""
    bomb, words = zlib.compress(b"x" * (64 << 20)), b"<!---->" * (2 << 20)
    return [
        file_of(png(64, 64, chunk(b"tEXt", b"a\0" + words))),
        file_of(png(64, 64, chunk(b"zTXt", b"a\0\0" + bomb))),
        file_of(png(64, 64, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))),
        file_of(png(64, 64, chunk(b"iCCP", b"a\0\0" + bomb))),
        file_of(png(64, 64, *[chunk(b"tEXt", b"a\0x")] * 200_000)),
        file_of(b"<?xml version='1.0'?>" + words),
        file_of(b"<!-- -->" * 1000 + b"<svg>"),
    ]


def bombs() -> list[bytes]:
    """Return forms with small files of pictures that are none."""
    return [
        file_of(png(13_340, 13_340)),
        file_of(png(LARGEST_SIDE, LARGEST_SIDE)),
        file_of(png(13_340, 13_340), 16),
        file_of(b"RIFF\x1e\0\0\0WEBPVP8L\x12\0\0\0\x2f\xff\xff\xff\x0f" + b"\0" * 13),
        file_of(b"\xff\xd8\xff" + b"\xff\xda\0\x02" * 100_000),
        post(
            EDITS, {"prompt": "x", "image": "data:image/png;base64," + base64.b64encode(png(13_340, 13_340)).decode()}
        ),
    ]


def names_of_fields() -> list[bytes]:
    """Return requests with the names of fields, where names can be."""
    words = ("<a" + "a" * 24_000, "[a" * 12_000, "a at 0x" * 3_000)
    in_a_query = [request("GET", f"/v1/videos?{word.replace(' ', '+')}=1") for word in words]
    in_json = [post(GENERATIONS, {"prompt": "x", word[:7] + word * 85: 1}) for word in words]
    in_a_form = [text_of(word * 85, b"x") for word in words]
    return [*in_a_query, *in_json, *in_a_form]


def pictures_that_wait(attacker: Attacker) -> Prepared:
    """Send jobs with pictures of 50 megapixels, which wait behind each other, and cancel them in the end."""
    fields = [("prompt", b"x"), ("size", b"64x64"), ("num_inference_steps", b"1000")]
    body = parts([*fields, *[('image[]"; filename="a', largest())] * 2])
    data = form(EDITS, body, prefer="respond-async")

    def send(index: int) -> None:
        while attacker.goes_on:
            remember(attacker, attacker.ask(data))

    return lambda: attacker.together(SENDERS, send)


def remember(attacker: Attacker, answer: bytes | None) -> None:
    """Cancel a job in the end, if an answer is one."""
    described = json.loads(answer) if answer else {}
    if "id" in described:
        attacker.afterwards.append(request("DELETE", f"/v1/jobs/{described['id']}"))


def stalled(attacker: Attacker) -> Prepared:
    """Open bodies that stop, large ones with most of what they announced; and others that trickle."""
    head = (
        f"POST {EDITS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {SIZE}\r\n\r\n"
    )
    most, little = head.encode() + b" " * (20 << 20), head.encode() + b" " * 1000
    holds = [
        lambda: attacker.hold(40, lambda index: most),
        lambda: attacker.hold(100, lambda index: little),
        lambda: attacker.hold(100, lambda index: little, b" " * 2000, NAP * 5),
    ]

    def attack() -> None:
        threads = [threading.Thread(target=hold, daemon=True) for hold in holds]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    return attack


LARGE_ATTACKS: Mapping[str, Attack] = {
    "stalled bodies": Attack(
        "240 bodies of 28 MB that stop: 40 after 20 MB, 100 after 1 KB; 100 go on at 20 KB a second",
        stalled,
        frozenset({"408", "429"}),
        {"408": 40},
        times=2.0,
    ),
    "long texts": Attack("eight at once: JSON of 28 MB, few texts", bodies(long_texts), REFUSED | {"200"}, {"400": 2}),
    "many items": Attack(
        "eight at once: JSON of 28 MB, many items or brackets",
        bodies(many_items),
        REFUSED,
        {"400": 2},
    ),
    "data URLs": Attack("eight at once: data URLs of 28 MB, a million escapes", bodies(data_urls), REFUSED, {"400": 2}),
    "names of 32 MB": Attack(
        "eight at once: a model's, a field's name of 32 MB", bodies(names_of_32_mb), REFUSED | {"404"}, {"400": 1}
    ),
    "hyphens": Attack("eight at once: forms of 28 MB of hyphens and line ends", bodies(hyphens), REFUSED, {"400": 2}),
    "almost boundaries": Attack(
        "eight at once: forms of 28 MB, the boundary without its end", bodies(almost_boundaries), REFUSED, {"400": 2}
    ),
    "many parts": Attack(
        "eight at once: forms of 28 MB, 128 parts and half a million", bodies(many_parts), REFUSED, {"400": 2}
    ),
    "many pictures": Attack(
        "eight at once: sixteen pictures of 25 megapixels in a form",
        bodies(lambda: [file_of(largest(), 16)]),
        REFUSED,
        {"400": 1},
    ),
    "pictures that wait": Attack(
        "eight at once: jobs of two pictures of 25 megapixels",
        pictures_that_wait,
        frozenset({"202", "429", "200"}),
        {"202": 1},
    ),
    "words in pictures": Attack(
        "eight at once: pictures with 15 MB of markup, bombs of 64 MB of text", bodies(marked_up), REFUSED, {"400": 2}
    ),
    "bombs": Attack("sixteen at once: 118 bytes that say 178 megapixels", bodies(bombs, 16), REFUSED, {"400": 20}),
    "names of fields": Attack(
        "sixteen at once: a field's name of 24 KB in a query, of 2 MB in bodies",
        bodies(names_of_fields, 16),
        REFUSED,
        {"400": 4},
    ),
}
