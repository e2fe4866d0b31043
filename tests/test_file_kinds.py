"""A file that is no picture that is taken is named for what it is, by every door through which pictures come."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image, features

from safelight import media
from safelight.errors import InvalidParameterError
from safelight.file_kinds import kind_of
from safelight.serving.limits import Limits
from tests.uploads import decode_picture


def written(kind, frames=1, **options):
    """Return a file that Pillow writes."""
    first, *others = [Image.new("RGB", (32, 24), (60 * index, 90, 10)) for index in range(frames)]
    file = io.BytesIO()
    animated = {"save_all": True, "append_images": others} if others else {}
    first.save(file, kind, **animated, **options)
    return file.getvalue()


def video(form, codec):
    """Return a file that the system's codecs write."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def brands(*names):
    """Return the beginning of an ISO media file: its major brand, and those with which it is compatible."""
    return (16 + 4 * (len(names) - 1)).to_bytes(4, "big") + b"ftyp" + names[0] + b"\0\0\0\0" + b"".join(names[1:])


FOREIGN = {
    "GIF": (lambda: written("GIF"), "a GIF"),
    "animated GIF": (lambda: written("GIF", 3), "a GIF"),
    "animated WebP": (lambda: written("WEBP", 3), "an animated WebP"),
    "lossless animated WebP": (lambda: written("WEBP", 2, lossless=True), "an animated WebP"),
    "AVIF": (lambda: written("AVIF"), "an AVIF"),
    "animated AVIF": (lambda: written("AVIF", 2), "an AVIF"),
    "AVIF of a camera": (lambda: brands(b"mif1", b"mif1", b"avif", b"miaf"), "an AVIF"),
    "HEIC": (lambda: brands(b"heic", b"mif1", b"heic"), "a HEIC"),
    "HEIC of another camera": (lambda: brands(b"mif1", b"mif1", b"heic"), "a HEIC"),
    "HEIC sequence": (lambda: brands(b"hevc", b"msf1", b"hevc"), "a HEIC"),
    "TIFF": (lambda: written("TIFF"), "a TIFF"),
    "big TIFF": (lambda: written("TIFF", big_tiff=True), "a TIFF"),
    "BMP": (lambda: written("BMP"), "a BMP"),
    "icon": (lambda: written("ICO"), "an icon"),
    "JPEG 2000": (lambda: written("JPEG2000"), "a JPEG 2000"),
    "JPEG XL": (lambda: b"\xff\x0a\xfa\x1f", "a JPEG XL"),
    "JPEG XL in a container": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n\0\0", "a JPEG XL"),
    "PDF": (lambda: written("PDF"), "a PDF"),
    "PostScript": (lambda: written("EPS"), "a PostScript"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG"),
    "SVG with a prologue": (lambda: b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made -->\n<svg/>', "an SVG"),
    "a page that was saved instead": (lambda: b"\n<!DOCTYPE html>\n<html>", "a web page"),
    "MP4": (lambda: video("mp4", "libx264"), "an MP4 video"),
    "QuickTime": (lambda: video("mov", "libx264"), "a QuickTime video"),
    "Matroska": (lambda: video("matroska", "libx264"), "a WebM or Matroska video"),
    "Photoshop": (lambda: b"8BPS\0\x01", "a Photoshop file"),
    "nothing": (lambda: b"", "an empty file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_taken_is_named(tmp_path, name):
    if "AVIF" in name and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    make, kind = FOREIGN[name]
    data, path = make(), tmp_path / "picture.png"  # the name says nothing
    path.write_bytes(data)
    with pytest.raises(InvalidParameterError, match=kind) as caught:
        decode_picture(data, "image", Limits())
    assert caught.value.param == "image"
    with pytest.raises(InvalidParameterError, match=f"image: got .*{kind}"):
        media.open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_is_taken_is_not_named(kind):
    data = written(kind)
    assert kind_of(data) is None
    assert decode_picture(data, "image", Limits()).size == (32, 24)


def test_any_beginning_of_any_file_is_judged():
    for make, _ in FOREIGN.values():
        data = make()
        for length in range(40):
            kind_of(data[:length])
