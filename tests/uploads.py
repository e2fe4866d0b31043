"""Pictures as a server takes them."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

from safelight.encoded import EncodedImage
from safelight.serving.input_pictures import damaged, open_picture
from safelight.serving.limits import Limits
from safelight.serving.trial import decodes


def decode_picture(data: bytes, param: str, limits: Limits) -> EncodedImage:
    """Return a picture that has been decoded once, in this process, and can be again; refuse what the server does."""
    image = open_picture(data, param, limits)
    if not decodes(image):
        raise damaged(image.kind, param)
    return image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture(mode="RGB", size=(32, 48), kind="PNG", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()
