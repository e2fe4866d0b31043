"""How many functions a reader has to open who follows one value through the server.

A walk is counted by a trace of one request through everything but processes: the application, the real supervisor and
channel, and a real worker of a tiny model in a thread. The value is the very text, or the very bytes.

- The way: the functions that are on the call stack, from the route or the first one that has it, where the value
  is handed over to another task, thread, process or tick (the stations), and where it is used.
- Those that give it: called by one on the way, they return the value: read, parsed, sorted, packed. Where such
  a function only passes on what another one gave it (the same object), that one too.

What only looks (a check, a cost, a digest), and what a function that converts uses inside, is not counted: nobody needs
it to follow the value. Comprehensions belong to the function that they stand in. An error is not followed up the stack
that it unwinds, but from whoever catches it. Names are those of arguments that are the value itself.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from PIL import Image

from safelight.core.config import PipelineConfig
from safelight.errors import OutOfMemoryError
from safelight.runtime.supervisor import supervisor
from tests.recipes.flux import KONTEXT
from tests.serving.walks import Counts, Walk, answers, start_thread

PROMPT = "a walk through every room of the house"
SMALL = {"height": 64, "width": 64, "max_area": 64 * 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "model"
    KONTEXT.build(folder, "default")
    return folder


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    monkeypatch.setattr(supervisor, "start_worker", start_thread)


def walked(walk: Walk, monkeypatch, model: Path, folder: Path, send):
    """Send a request, follow it, and print the walk; return the answer."""
    with walk.traced(monkeypatch):
        response = asyncio.run(answers(model, folder, send))
    print(walk.report())
    return response


MOST = {
    "prompt": Counts(16, 10, 29, 17, 1),
    "picture": Counts(14, 10, 28, 17, 2),
    "error": Counts(8, 6, 16, 9, 2),
}
"""What each walk has at most."""


def check(walk: Walk, name: str) -> None:
    """Refuse a walk that has become longer."""
    assert all(found <= most for found, most in zip(walk.counts(), MOST[name], strict=True)), walk.report()


TO_WORKER = ("ServerChannel.send", "WorkerChannel._receive", "Engine.add")
TO_API = ("Engine._end", "WorkerChannel.send", "WorkerChannel._send", "Ticket.fail")


def test_a_prompt_to_its_tokens(model, tmp_path, monkeypatch):
    def is_tokenizer(frame):
        return frame.f_code.co_name == "__call__" and frame.f_locals.get("text") == PROMPT

    encoded = PROMPT.encode()

    def holds(value):
        return value == PROMPT if isinstance(value, str) else isinstance(value, bytes | bytearray) and encoded in value

    walk = Walk(holds, TO_WORKER, is_tokenizer)
    body = {"prompt": PROMPT, "seed": 1, **SMALL}
    response = walked(walk, monkeypatch, model, tmp_path, lambda http: http.post("/v1/images/generations", json=body))
    assert response.status_code == 200, response.text
    assert set(walk.stacks) == {*TO_WORKER, "end"}
    check(walk, "prompt")


def test_a_picture_to_the_vae(model, tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.effect_noise((160, 144), 90).convert("RGB").save(file, "PNG")
    pixels = Image.open(file).convert("RGB").tobytes()
    data = file.getvalue()

    def holds(value):
        return isinstance(value, bytes | bytearray) and (data in value or pixels in value)

    walk = Walk(holds, TO_WORKER, lambda frame: frame.f_code.co_qualname == "AutoencoderKL.encode")
    form = {"data": {"prompt": PROMPT, **SMALL, "auto_resize": "false"}, "files": {"image": ("a.png", data)}}
    response = walked(walk, monkeypatch, model, tmp_path, lambda http: http.post("/v1/images/edits", **form))
    assert response.status_code == 200, response.text
    assert set(walk.stacks) == {*TO_WORKER, "end"}
    check(walk, "picture")


def test_an_error_to_its_answer(model, tmp_path, monkeypatch):
    """From the stage that raises it, in the worker, to the answer."""
    said = "this was not foreseen by anybody"

    def fail(*_):
        raise OutOfMemoryError(said)

    monkeypatch.setattr(PipelineConfig, "text_encoder_inputs", fail)
    walk = Walk(
        lambda value: said in str(value), TO_API, lambda frame: frame.f_code.co_qualname == "JSONResponse.render"
    )
    body = {"prompt": PROMPT, "seed": 1, **SMALL}
    response = walked(walk, monkeypatch, model, tmp_path, lambda http: http.post("/v1/images/generations", json=body))
    assert response.status_code == 503 and said in response.text
    assert set(walk.stacks) == {*TO_API, "end"}
    check(walk, "error")
