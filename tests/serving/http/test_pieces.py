"""Bodies looked at a piece at a time: what comes of it is what the standard library makes of the whole."""

from __future__ import annotations

import base64
import random
from urllib.parse import unquote_to_bytes

import pytest

from safelight.serving.http import pieces
from safelight.serving.http.pieces import from_percent, has_more, to_base64

pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.parametrize("length", range(40))
def test_base64(length):
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data)
    assert b"".join(to_base64(pieces.pieces(data))) == text

    def from_base64(text):
        return b"".join(pieces.from_base64(pieces.pieces(text)))

    for written in (text, text.rstrip(b"="), b"\r\n".join(text[at : at + 5] for at in range(0, len(text), 5))):
        assert from_base64(written) == data
    for at in range(len(text)):
        for wrong in (b"!", b"\0"):
            with pytest.raises(ValueError):
                from_base64(text[:at] + wrong + text[at:])
    for padded in (b"QQ==" + text, b"=" + text, text + b"====="):
        if length:
            with pytest.raises(ValueError):
                from_base64(padded)


def test_percent():
    draw = random.Random(5)
    for _ in range(1000):
        text = "".join(draw.choices(["%", "%41", "%4", "a", "é", "%%", "%zz"], k=draw.randrange(30)))
        assert b"".join(from_percent(pieces.pieces(text.encode()))) == unquote_to_bytes(text)


def test_counting_stops():
    for most in range(12):
        assert has_more(bytearray(b"a,b[" * 5), most) == (most < 10)
        assert has_more(bytearray(b"\\/abcde" * 70), most) == (most < 7)
