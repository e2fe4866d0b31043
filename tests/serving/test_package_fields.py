"""Fields of the package's pipelines over HTTP: what the engine is given is what the library would give it."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight import DiffusionGenerator
from safelight.backends.diffusers import describe, pipeline_entry
from safelight.clips import EncodedClip
from safelight.core.options import NULL
from safelight.preparation import prepare
from tests.clip_files import encoded_clip
from tests.serving.http_server import running
from tests.serving.wire import ASYNC, finished_job

SIZES = {"height": 32, "width": 48, "num_inference_steps": 2}


def schema_of(name):
    return describe("org/tiny", name, pipeline_entry(name).sampling_param_cls(), ())


def png(colour="red", size=(24, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def opened(data):
    return Image.open(io.BytesIO(data))


def plain(value):
    """Return a field's value with pictures as pixels and clips as their files."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    if isinstance(value, EncodedClip):
        return value.file
    return np.asarray(value).tolist() if isinstance(value, Image.Image) else value


def same(ours, theirs):
    assert type(ours).__name__ == type(theirs).__name__
    assert {name: plain(value) for name, value in vars(ours).items()} == {
        name: plain(value) for name, value in vars(theirs).items()
    }


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    with running(tmp_path_factory.mktemp("moving"), schema_of("WanVACEPipeline")) as server:
        yield server


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    with running(tmp_path_factory.mktemp("still"), schema_of("SanaPipeline")) as server:
        yield server


CLIP, RED, BLUE = encoded_clip(), png(), png("blue")
FIELDS = {"prompt": "x", "seed": 3, "num_frames": 5, **SIZES}
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, bytes | str]] | None]] = {
    "a file": ({"video": CLIP}, {"video": url(CLIP, "video/mp4")}, [("video", CLIP)]),
    "frames": (
        {"video": [opened(RED), opened(BLUE)], "mask": [opened(RED)]},
        {"video": [url(RED), url(BLUE)], "mask": [url(RED)]},
        [("video[]", RED), ("video[]", BLUE), ("mask[]", RED)],
    ),
    "lists of lists": (
        {"reference_images": [[opened(RED)], [opened(BLUE), opened(RED)]]},
        {"reference_images": [[url(RED)], [url(BLUE), url(RED)]]},
        None,
    ),
    "a list of one": (
        {"reference_images": [opened(RED)]},
        {"reference_images": [url(RED)]},
        [("reference_images[]", RED)],
    ),
    "one": ({"reference_images": opened(RED)}, {"reference_images": url(RED)}, [("reference_images", RED)]),
    "numbers": (
        {"conditioning_scale": [0.5, 1.0], "attention_kwargs": {"scale": 0.5}},
        {"conditioning_scale": [0.5, 1], "attention_kwargs": {"scale": 0.5}},
        [("conditioning_scale", "[0.5, 1]"), ("attention_kwargs", '{"scale": 0.5}')],
    ),
    "null": ({"conditioning_scale": None}, {"conditioning_scale": None}, [("conditioning_scale", "null")]),
}


@pytest.mark.parametrize("case", ASKED)
@pytest.mark.parametrize("way", ["json", "client"])
def test_what_is_sent_is_what_the_library_is_given(moving, case, way):
    sent_by(moving, case, way)


@pytest.mark.parametrize("case", [case for case, (_, _, form) in ASKED.items() if form is not None])
def test_a_forms_parts_are_what_the_library_is_given(moving, case):
    """Lists in lists of files have no names in a form."""
    sent_by(moving, case, "form")


def sent_by(moving, case, way):
    """Send a case's fields one way, and compare what the engine is given."""
    ours, sent, form = ASKED[case]
    schema = schema_of("WanVACEPipeline")
    wanted = prepare(schema, {**FIELDS, **ours})[0]
    if way == "client":
        with DiffusionGenerator.connect(moving.url) as remote:
            assert len(remote.generate(**FIELDS, **ours).videos) == 1
    else:
        with moving.http() as http:
            if way == "json":
                answer = http.post("/v1/videos", json={**FIELDS, **sent})
            else:
                assert form is not None
                texts = {name: value for name, value in form if isinstance(value, str)}
                texts |= {name: str(value) for name, value in FIELDS.items()}
                files: list[Any] = [(name, ("a", value)) for name, value in form if isinstance(value, bytes)]
                files += [(name, (None, text)) for name, text in texts.items()]
                answer = http.post("/v1/videos", files=files)
            assert answer.status_code == 200, answer.text
            assert finished_job(http, answer.json()["id"])["state"] == "completed"
    same(moving.engine.submitted[-1].params, wanted)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"video": url(b"not a video")}, "video"),
        ({"video": "https://example.com/a.mp4"}, "video"),
        ({"video": url(CLIP[:300], "video/mp4")}, "video"),
        ({"video": url(CLIP[:-300], "video/mp4")}, "video"),
        ({"video": [[url(RED)]]}, "video"),
        ({"video": []}, "video"),
        ({"mask": [None]}, "mask"),
        ({"reference_images": [[[[url(RED)]]]]}, "reference_images"),
        ({"reference_images": [url(b"")]}, "reference_images"),
        ({"conditioning_scale": "much"}, "conditioning_scale"),
        ({"conditioning_scale": []}, "conditioning_scale"),
        ({"conditioning_scale": 1e9}, "conditioning_scale"),
        ({"attention_kwargs": [1]}, "attention_kwargs"),
        ({"attention_kwargs": {"a": "b\0"}}, "attention_kwargs"),
        ({"latents": [1.0]}, "latents"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else value,
)
def test_what_is_not_taken_is_refused_by_name(moving, fields, param):
    with moving.http() as http:
        answer = http.post("/v1/videos", json={**FIELDS, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert "\n" not in answer.json()["error"]["message"]


@pytest.mark.parametrize("given", [{}, {"complex_human_instruction": None}, {"complex_human_instruction": ["a", "b"]}])
@pytest.mark.parametrize("way", ["json", "job", "client"])
def test_null_is_not_what_is_unset(still, given, way):
    fields = {"prompt": "x", "seed": 1, **SIZES, **given}
    if way == "client":
        with DiffusionGenerator.connect(still.url) as remote:
            remote.generate(**fields)
    else:
        with still.http() as http:
            headers = ASYNC if way == "job" else {}
            answer = http.post("/v1/images/generations", json=fields, headers=headers)
            assert answer.status_code in (200, 202), answer.text
            if way == "job":
                job = finished_job(http, answer.json()["id"])
                assert job["params"].get("complex_human_instruction", "unset") == (
                    given["complex_human_instruction"]
                    if given
                    else list(schema_of("SanaPipeline").defaults["complex_human_instruction"])
                )
    made = vars(still.engine.submitted[-1].params)["complex_human_instruction"]
    asked = given.get("complex_human_instruction", schema_of("SanaPipeline").defaults["complex_human_instruction"])
    assert made == (NULL if asked is None else tuple(asked))


def test_a_prompt_is_asked_for_where_the_call_requires_it_alone(moving):
    """Wan's own check is the call's: it takes embeddings instead."""
    with moving.http() as http:
        described = http.get("/v1/models/org%2Ftiny/schema").json()
    assert "prompt" not in described["required"]
    assert described["properties"]["video"]["anyOf"][-1] == {"type": "null"}
