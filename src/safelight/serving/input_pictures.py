"""Input pictures: judged by their bytes and from their headers, before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safelight import media
from safelight.encoded import EncodedImage
from safelight.errors import InvalidParameterError
from safelight.file_kinds import HEAD_BYTES, kind_of
from safelight.serving.http.errors import TooLargeError
from safelight.serving.http.forms import Upload
from safelight.serving.http.pieces import from_base64, from_percent, pieces
from safelight.serving.http.spool import LongText, Stored
from safelight.serving.limits import Limits

_DATA_URL = re.compile(rb'data:((?:[^,"]|"[^"]{0,1000}"){0,1000}),', re.IGNORECASE)
"""RFC 2397: a media type, its parameters, whose values may be quoted, and perhaps `;base64`."""
_DATA_URL_HEAD = 1 << 15
"""Bytes of a long one in which all of that is."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{100,}={0,2}[\r\n]*")
_MAX_ESCAPES = 1_000_000
"""Of `%XX` in one data URL: a million are a file of a few megabytes, and take half a second."""
_MAX_CHUNKS = 16_384
"""Of a PNG: encoders cut 16 MiB into 2,048 pieces of 8 KiB."""
_MAX_SEGMENTS = 2048
"""Of a JPEG before its first scan: 16 MiB of profiles and metadata are 256."""
_MAX_SKIPPED = 2048
"""Bytes between these, which a JPEG may have to fill them up, and which Pillow reads one by one."""
_MAX_SCANS = 100
"""Of a JPEG: a progressive one has about ten, and each is a pass over all pixels."""
_SCAN, _ALONE = 0xDA, frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers of a JPEG: of a scan, and those that no length follows."""
_TAKES = "a PNG, JPEG or WebP file of one picture"
_TAKES_BYTES = "the picture itself: a file in a form (image, or image[] for each of several), or a data URL"
Size = tuple[int, int]
"""Width and height in pixels."""


def picture_bytes(value: Any, param: str, limits: Limits) -> bytes | Stored:
    """Return the file of an uploaded picture, or of a data URL. Of a large one that takes a while: run it in a thread.

    What is long stays on disk: what is decoded of a body's text is added to the body's spool.

    Raises:
        InvalidParameterError: for anything else: no path is opened, and no URL is fetched.
        TooLargeError: for more bytes than are taken.

    """
    if isinstance(value, dict):
        value = _referenced(value, param)
    if isinstance(value, Upload):
        if len(value.data) > limits.image_bytes:
            raise _too_large(param, limits)
        return value.data
    if isinstance(value, LongText):
        if (match := _DATA_URL.match(value.head(_DATA_URL_HEAD))) is not None:
            return value.spool.store(_data_url_bytes(match[1], value.pieces(match.end()), param, limits))
    elif isinstance(value, str) and (match := _DATA_URL.match(data := value.encode("utf-8", "surrogatepass"))):
        return b"".join(_data_url_bytes(match[1], pieces(data[match.end() :]), param, limits))
    text = value.start if isinstance(value, LongText) else value
    raise InvalidParameterError(param, _text_described(text) if isinstance(text, str) else value, _TAKES_BYTES)


def _too_large(param: str, limits: Limits) -> TooLargeError:
    return TooLargeError.rebuilt(f"{param}: at most {limits.image_bytes} bytes are taken", param)


def _referenced(value: dict[str, Any], param: str) -> Any:
    """Return what a reference to a picture holds, as the SDK writes one."""
    given = {name: entry for name, entry in value.items() if entry is not None}
    if set(given) == {"image_url"}:
        return given["image_url"]
    if "file_id" in given:
        raise InvalidParameterError(
            param, "a file_id", "image_url with a data URL: this server keeps no files of clients"
        )
    names = ", ".join(given)
    raise InvalidParameterError(param, f"an object with {names[:60]}" if given else "an empty object", _TAKES_BYTES)


def _data_url_bytes(about: bytes, text: Iterator[bytes], param: str, limits: Limits) -> Iterator[bytes]:
    """Yield what a data URL holds: percent-encoded, and then perhaps base64, which may be broken into lines."""
    data = from_percent(_counted(text, param))
    if about.rstrip().lower().endswith(b";base64"):
        data = from_base64(data)
    num_bytes = 0
    try:
        for piece in data:
            num_bytes += len(piece)
            if num_bytes > limits.image_bytes:
                raise _too_large(param, limits)
            yield piece
    except ValueError as error:
        raise InvalidParameterError(param, "a data URL", "base64 in a data URL") from error


def _counted(text: Iterator[bytes], param: str) -> Iterator[bytes]:
    left = _MAX_ESCAPES
    for piece in text:
        left -= piece.count(b"%")
        if left < 0:
            raise InvalidParameterError(
                param, f"more than {_MAX_ESCAPES} escapes in a data URL", "base64 in a data URL"
            )
        yield piece


def _text_described(text: str) -> str:
    """Say what a text is that is no data URL, so that whoever sent it knows what to change."""
    begin = "".join(text[:100].split())[:24]
    with contextlib.suppress(binascii.Error, ValueError):
        head = base64.b64decode(begin[: len(begin) // 4 * 4], validate=True)
        for name, known in _SIGNATURES.items():
            if known(head):
                return f"base64 of a {name} file without data:image/{name.lower()};base64, before it"
    if _BASE64.fullmatch(text[:1000]):
        return "base64 without data:image/png;base64, before it"
    return "a URL or a path"


def open_picture(file: bytes | Stored, param: str, limits: Limits) -> EncodedImage:
    """Return a picture, of which the header alone has been read. What is on disk stays there.

    Raises:
        InvalidParameterError: if it is of another format, has more pixels than are taken, or a damaged header.

    """
    data, kept = (file, None) if isinstance(file, bytes) else (file.read(), file)
    name = next((name for name, known in _SIGNATURES.items() if known(data)), None)
    foreign = kind_of(data[:HEAD_BYTES])
    if name is None or foreign is not None:
        raise InvalidParameterError(param, foreign or "other bytes", _TAKES)
    try:
        size = _SIZES[name](data)
        if size is not None:
            _check_size(size, param, limits)
        image = EncodedImage.read(data, (name,), kept)
        _check_size(image.size, param, limits)
    except media.UNREADABLE as error:
        raise damaged(name, param) from error
    return image


def damaged(kind: str, param: str) -> InvalidParameterError:
    """Return the error for a file of a format that is no whole picture."""
    return InvalidParameterError(param, f"a damaged {kind} file", _TAKES)


def _check_size(size: Size, param: str, limits: Limits) -> None:
    width, height = size
    if max(size) > limits.image_side or width * height > limits.image_pixels:
        most = f"at most {limits.image_side} pixels along a side, and {limits.image_pixels} in all"
        raise InvalidParameterError(param, f"{width}x{height}", most)


def _png_size(data: bytes) -> Size:
    """Walk over the chunks of a PNG, whose checksums Pillow does not all look at."""
    at = 8
    for number in range(_MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(memoryview(data)[at + 4 : end]) != checksum or (kind == b"IHDR") != (number == 0):
            raise ValueError("a damaged chunk")
        at = end + 4
        if kind == b"IEND":
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
    raise ValueError("too many chunks")


def _jpeg_size(data: bytes) -> None:
    """Bound the head and the passes; the size is Pillow's to read, which decodes nothing until it is asked to."""
    at, skipped, marker = 2, 0, 0
    for _ in range(_MAX_SEGMENTS):
        while data[at : at + 1] != b"\xff" or data[at + 1 : at + 2] in (b"\0", b"\xff"):
            at, skipped = at + 1, skipped + 1
            if skipped > _MAX_SKIPPED:
                raise ValueError("too much between its segments")
        (marker,) = struct.unpack_from("B", data, at + 1)
        if marker == _SCAN:
            break
        at += 2 if marker in _ALONE else 2 + max(2, *struct.unpack_from(">H", data, at + 2))
    if marker != _SCAN:
        raise ValueError("too many segments")
    if data.count(b"\xff\xda") > _MAX_SCANS:
        raise ValueError("too many scans")


def _webp_size(data: bytes) -> Size:
    """Read the size of a still WebP: Pillow makes room for all of its pixels when it opens one."""
    kind, payload = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return int.from_bytes(payload[4:7], "little") + 1, int.from_bytes(payload[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(payload[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", payload, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no WebP picture")


_SIGNATURES: Mapping[str, Callable[[bytes], bool]] = {
    "PNG": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
    "JPEG": lambda data: data.startswith(b"\xff\xd8\xff"),
    "WEBP": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
}
_SIZES: Mapping[str, Callable[[bytes], Size | None]] = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}
