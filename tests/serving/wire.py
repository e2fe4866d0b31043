"""What tests of the API say and read: routes, headers, pictures, events, and how a job ends."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import httpx
from PIL import Image

from tests.serving.http_server import PROMPT

JSON = {"content-type": "application/json"}
ASYNC = {"prefer": "respond-async"}
GENERATIONS = "/v1/images/generations"
KEY = "sk-a key of many characters"
PAGE = "https://app.example.com"


def png(size=(32, 48)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def events_of(response):
    """Yield (event, data) of an event stream as it comes."""
    name = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def finished_job(http, job_id):
    end = time.monotonic() + 10
    while (job := http.get(f"/v1/jobs/{job_id}").json())["state"] not in ("completed", "failed"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


def flat(app):
    found: list[Any] = []
    for route in app.routes:
        inner = vars(route).get("original_router")
        found += flat(inner) if inner is not None else [route]
    return found


def picture_of(answer) -> Any:
    """Return the one picture of an SDK's answer, whose fields are those that were asked for."""
    (picture,) = answer.data
    return picture


def raw_request(server, target, key=None, method="GET", **more):
    """Return a request whose target is sent as it stands: httpx would take `//a` for a host."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    request = httpx.Request(method, server.url, headers=headers, **more)
    request.url = request.url.copy_with(raw_path=target.encode())
    return request


def control(http):
    """A request that succeeds, and makes what it always makes."""
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 1})
    assert answer.status_code == 200
    return answer.json()["data"][0]["b64_json"]
