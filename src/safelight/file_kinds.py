"""What a file is, by its first bytes: so that a picture that is not taken is named for what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

HEAD_BYTES = 1024
"""Of a file, that are looked at."""
_BEGINNINGS: Sequence[tuple[bytes, str]] = (
    (b"GIF87a", "a GIF"),
    (b"GIF89a", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"II+\0", "a TIFF"),
    (b"MM\0+", "a TIFF"),
    (b"BM", "a BMP"),
    (b"\0\0\1\0", "an icon"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (b"8BPS", "a Photoshop file"),
    (b"\x76\x2f\x31\x01", "an OpenEXR"),
    (b"#?RADIANCE", "a Radiance HDR"),
    (b"qoif", "a QOI"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "a PostScript"),
    (b"\x1aE\xdf\xa3", "a WebM or Matroska video"),
    (b"PK\x03\x04", "a ZIP"),
)
_BRANDS: Mapping[bytes, str] = {
    **dict.fromkeys((b"avif", b"avis"), "an AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC"),
    b"qt  ": "a QuickTime video",
}
"""Of ISO media files: the first that is in the list of brands; any other is of a video."""
_MARKUP: Mapping[bytes, str] = {
    b"<svg": "an SVG",
    b"<!doctype svg": "an SVG",
    b"<html": "a web page",
    b"<!doctype html": "a web page",
}
_BEFORE_MARKUP: Mapping[bytes, bytes] = {b"<?xml": b">", b"<!--": b"-->"}
"""What may stand before it, and how that ends."""


def kind_of(head: bytes) -> str | None:
    """Say what a file is that begins like this, with its article; None for what is taken, and what is not known."""
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        return _media_kind(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "an animated WebP" if head[12:16] == b"VP8X" and head[20:21] and head[20] & 0x02 else None
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    return _markup_kind(head.removeprefix(b"\xef\xbb\xbf").lower())


def _markup_kind(head: bytes) -> str | None:
    """Say what markup this is, in one pass: comments can be read in several ways, and an expression tries them all."""
    at = len(head) - len(head.lstrip())
    while begun := next((begin for begin in _BEFORE_MARKUP if head.startswith(begin, at)), None):
        end = head.find(_BEFORE_MARKUP[begun], at + len(begun))
        if end < 0:
            return None
        at = end + len(_BEFORE_MARKUP[begun])
        while head[at : at + 1].isspace():
            at += 1
    for begin, kind in _MARKUP.items():
        following = head[at + len(begin) : at + len(begin) + 1]
        if head.startswith(begin, at) and not (following.isalnum() or following == b"_"):
            return kind
    return None


def _media_kind(head: bytes) -> str:
    """Say what an ISO media file is, by its brands: the major one, and those with which it is compatible."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, length - 3, 4))]
    found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    return "an AVIF" if "an AVIF" in found else found[0] if found else "an MP4 video"
