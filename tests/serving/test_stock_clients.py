"""What clients send that were written for OpenAI's server, or for any: values, forms and data URLs."""

from __future__ import annotations

import io
import json
import threading

import openai
import pytest
from PIL import Image

from safelight.serving import fields as fields_module
from safelight.serving import jobs_api
from tests.serving.form_parts import (
    EDITS,
    GENERATIONS,
    PICTURE,
    SEVERAL,
    data_url,
    disposed,
    form,
    last_params,
    part,
    png,
)
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    with running(tmp_path_factory.mktemp("pictures")) as server:
        yield server


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), SEVERAL) as server:
        yield server


# values


@pytest.mark.parametrize(("quality", "resolved", "steps"), [("standard", "medium", 4), ("hd", "high", 6)])
def test_older_names_of_qualities(pictures, editor, quality, resolved, steps):
    with pictures.openai() as client:
        assert client.images.generate(prompt=PROMPT, quality=quality).quality == resolved
        assert last_params(pictures).num_inference_steps == steps
        (event,) = client.images.generate(prompt=PROMPT, quality=quality, stream=True)
        assert event.quality == resolved
    with editor.openai() as client:
        assert client.images.edit(image=png(), prompt="x", quality=quality).quality == resolved
        assert last_params(editor).num_inference_steps == steps


@pytest.mark.parametrize("output_format", [None, "png", "webp", "jpeg"])
def test_full_output_compression_goes_with_every_format(pictures, output_format):
    with pictures.openai() as client:
        answer = client.images.generate(prompt=PROMPT, output_format=output_format, output_compression=100)
        assert answer.output_format == (output_format or "png") and answer.warnings == []
        if output_format in (None, "png"):
            for compression in (0, 99):
                with pytest.raises(openai.BadRequestError, match="100 or null") as caught:
                    client.images.generate(prompt=PROMPT, output_format=output_format, output_compression=compression)
                assert caught.value.param == "output_compression"


def test_input_fidelity_has_no_effect_and_says_so(editor):
    with editor.openai() as client:
        for fidelity in ("high", "low"):
            answer = client.images.edit(image=png(), prompt="x", input_fidelity=fidelity, extra_body={"seed": 1})
            assert [text for text in answer.warnings if "fidelity" in text] == ["input_fidelity has no effect"]
        plain = client.images.edit(image=png(), prompt="x", extra_body={"seed": 1})
        assert "fidelity" not in str(plain.warnings) and plain.data[0].b64_json == answer.data[0].b64_json


def test_what_is_of_edits_is_unknown_to_a_model_without_pictures(pictures, editor):
    with pictures.http() as http, editor.http() as edits:
        for name in ("input_fidelity", "images"):
            assert assert_error(http.post(GENERATIONS, json={"prompt": "x", name: "high"}), 400, name)["code"] == (
                "unknown_parameter"
            )
            schemas = [each.get("/v1/models/tiny/schema").json()["properties"] for each in (http, edits)]
            assert [name in schema for schema in schemas] == [False, True]


def test_a_mask_that_is_null_is_none(pictures, editor):
    with editor.http() as http:
        answer = http.post(EDITS, json={"prompt": "x", "image": data_url(png()), "mask": None})
        assert answer.status_code == 200
        assert_error(http.post(EDITS, json={"prompt": "x", "image": data_url(png()), "musk": None}), 400, "musk")


def test_a_page_of_three_point_nought(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA) as server, server.http() as http:
        for _ in range(3):
            http.post("/v1/videos", json={"prompt": "x", "num_frames": 5.0, "seconds": None})
        assert len(http.get("/v1/videos?limit=2.0").json()["data"]) == 2
        assert_error(http.get("/v1/videos?limit=2.5"), 400, "limit")


# pictures in JSON


def test_edits_as_json(editor):
    """As the SDK's other languages and the API's reference write them."""
    with editor.http() as http:
        for images in (
            [{"image_url": data_url(png())}],
            [{"image_url": data_url(png()), "file_id": None}],
            [{"image_url": data_url(png(64, 32))}, {"image_url": data_url(png())}],
            [data_url(png())],
        ):
            answer = http.post(EDITS, json={"prompt": "x", "images": images, "n": 1, "seed": 1})
            assert answer.status_code == 200, answer.text
            sizes = [image.size for image in last_params(editor).image]
            assert sizes == ([(64, 32), (32, 48)] if len(images) == 2 else [(32, 48)])
        both = {"images": [{"image_url": data_url(png())}], "image": data_url(png())}
        assert "another field" in assert_error(http.post(EDITS, json={"prompt": "x", **both}), 400, "image")["message"]
        assert_error(http.post(EDITS, json={"prompt": "x", "images": []}), 400, "images")
        none = http.post(EDITS, json={"prompt": "x", "images": None})
        assert_error(none, 400, "image")
        many = http.post(EDITS, json={"prompt": "x", "images": [data_url(png())] * 5})
        assert "0 to 4" in assert_error(many, 400, "image")["message"]


@pytest.mark.parametrize("field", ["images", "image"])
def test_a_file_id_is_refused_by_name(editor, field):
    with editor.http() as http:
        for reference in ({"file_id": "file-abc"}, {"file_id": "file-abc", "image_url": data_url(png())}):
            error = assert_error(http.post(EDITS, json={"prompt": "x", field: [reference]}), 400, field)
            assert "file_id" in error["message"] and "image_url" in error["message"]


@pytest.mark.parametrize(
    "reference",
    [{"image_url": {"url": "data:,"}}, {"url": "x"}, {}, {"image_url": None}, {"type": "a", "image_url": "b"}],
)
def test_other_objects_are_refused(editor, reference):
    with editor.http() as http:
        assert_error(http.post(EDITS, json={"prompt": "x", "images": [reference]}), 400, "images")


@pytest.mark.parametrize(
    ("module", "function"), [(fields_module, "picture_bytes"), (jobs_api, "request_digest")], ids=["read", "hash"]
)
def test_large_bodies_are_looked_at_in_a_thread(editor, monkeypatch, module, function):
    threads, real = [], vars(module)[function]

    def recorded(*arguments):
        threads.append(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(module, function, recorded)
    file = io.BytesIO()
    Image.effect_noise((400, 400), 100).save(file, "PNG")
    with editor.http() as http:
        for index, data in enumerate((file.getvalue(), png())):
            headers = {"idempotency-key": f"{function} {index}", "prefer": "respond-async"}
            answer = http.post(EDITS, json={"prompt": "x", "image": data_url(data)}, headers=headers)
            assert answer.status_code == 202
    assert threads[0] != "server" and threads[1] == "server"


# forms, as clients write them


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_begins_with_a_picture_however_it_comes(tmp_path):
    with running(tmp_path, IMAGE_TO_VIDEO_SCHEMA) as server, server.http() as http:
        for reference in (data_url(png()), {"image_url": data_url(png())}):
            answer = http.post("/v1/videos", json={"prompt": "x", "input_reference": reference, "seconds": 1})
            assert answer.status_code == 200, answer.text
        parts = [part([disposed('name="input_reference"'), "Content-Type: image/png"], PICTURE)]
        parts.append(part(disposed('name="prompt"'), b"x"))
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert http.post("/v1/videos", content=form(parts, "b"), headers=headers).status_code == 200
        answer = http.post("/v1/videos", json={"prompt": "x", "input_reference": {"file_id": "file_1"}})
        assert "file_id" in assert_error(answer, 400, "input_reference")["message"]
        assert json.loads(answer.content)["error"]["type"] == "invalid_request_error"
