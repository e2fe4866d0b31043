"""Pictures and parts of forms as stock clients write them."""

from __future__ import annotations

import base64
import dataclasses
import io

from PIL import Image

from tests.serving.stub_engine import EDIT_SCHEMA

SEVERAL = dataclasses.replace(EDIT_SCHEMA, num_input_images=(0, 4))


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def png(width=32, height=48, kind="PNG", color=(200, 10, 10)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def data_url(data, about="data:image/png;base64,"):
    return about + base64.b64encode(data).decode()


def last_params(server):
    return server.engine.submitted[-1].params


def part(headers, content):
    lines = headers if isinstance(headers, list) else [headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def disposed(rest):
    return f"Content-Disposition: form-data; {rest}"


PICTURE = png()


def form(parts, boundary, begin=b"", end=b"\r\n"):
    mark = b"--" + boundary.encode()
    return begin + b"".join(mark + b"\r\n" + each + b"\r\n" for each in parts) + mark + b"--" + end
