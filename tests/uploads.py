"""Pictures as a server takes them."""

from __future__ import annotations

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
