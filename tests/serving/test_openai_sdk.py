"""What an unmodified `openai` SDK asks and understands: every row of the wire's table."""

from __future__ import annotations

import base64
import io

import openai
import pytest
from PIL import Image

from tests.serving.http_server import NAMES, PROMPT, running
from tests.serving.stub_engine import EDIT_SCHEMA, VIDEO_SCHEMA

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("images"), key="sk-secret") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    with running(tmp_path_factory.mktemp("edits"), EDIT_SCHEMA) as server, server.openai() as client:
        yield client


def png(width=32, height=48, mode="RGB", color=(200, 10, 10)):
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, "PNG")
    return file.getvalue()


def opened(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))


def test_the_sdk_is_the_pinned_one():
    assert openai.__version__ == "3.52.0"


# pictures


def test_generate(client):
    response = client.images.generate(prompt=PROMPT)
    (picture,) = response.data
    assert opened(picture).size == (96, 64) and opened(picture).format == "PNG"
    assert picture.url is None and picture.revised_prompt is None
    assert isinstance(picture.seed, int)
    assert (response.size, response.quality, response.output_format) == ("96x64", "medium", "png")
    assert response.background == "opaque" and response.created > 1.7e9
    usage = response.usage
    assert usage.output_tokens == 24 and usage.input_tokens == usage.input_tokens_details.text_tokens == 3
    assert usage.total_tokens == 27 and usage.input_tokens_details.image_tokens == 0
    assert response.metrics["seconds"] >= response.metrics["queue_seconds"] >= 0
    assert response.warnings == []


def test_every_optional_field_may_be_null(client):
    names = "model n size quality output_format output_compression background response_format stream partial_images"
    nulls = dict.fromkeys([*names.split(), "moderation", "style", "user"])
    response = client.images.generate(prompt=PROMPT, **nulls, extra_body={"seed": None, "negative_prompt": None})
    assert response.size == "96x64"


def test_extra_body_reaches_the_model(client, server):
    extra = {"seed": 7, "num_inference_steps": 2, "guidance_scale": 2, "negative_prompt": "blue"}
    first, second = (client.images.generate(prompt=PROMPT, extra_body=extra) for _ in range(2))
    assert first.data[0].b64_json == second.data[0].b64_json and first.data[0].seed == 7
    params = server.engine.submitted[-1].params
    assert (params.seed, params.num_inference_steps, params.guidance_scale) == (7, 2, 2.0)
    assert params.negative_prompt == "blue"
    assert "negative_prompt has no effect unless true_cfg_scale is above 1" in first.warnings


def test_an_unset_seed_is_random_and_returned(client):
    seeds = {client.images.generate(prompt=PROMPT).data[0].seed for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed < 2**53 for seed in seeds)


def test_n_pictures_have_seeds_in_a_row(client):
    response = client.images.generate(prompt=PROMPT, n=3, extra_body={"seed": 2**64 - 3})
    assert [picture.seed for picture in response.data] == [2**64 - 3, 2**64 - 2, 2**64 - 1]
    assert len({picture.b64_json for picture in response.data}) == 3
    assert response.usage.output_tokens == 3 * 24


@pytest.mark.parametrize("size", ["auto", "128x64", "64x128"])
def test_size(client, size):
    response = client.images.generate(prompt=PROMPT, size=size)
    made = "96x64" if size == "auto" else size
    assert response.size == made and "{}x{}".format(*opened(response.data[0]).size) == made


@pytest.mark.parametrize(
    ("quality", "steps"), [("low", 2), ("medium", 4), ("high", 6), ("xhigh", 8), ("max", 12), ("auto", 4)]
)
def test_quality_is_a_preset_of_steps(client, server, quality, steps):
    response = client.images.generate(prompt=PROMPT, quality=quality)
    assert server.engine.submitted[-1].params.num_inference_steps == steps
    assert response.quality == ("medium" if quality == "auto" else quality)


@pytest.mark.parametrize(("output_format", "compression"), [("png", None), ("jpeg", 40), ("webp", 100), ("webp", None)])
def test_output_format(client, output_format, compression):
    response = client.images.generate(prompt=PROMPT, output_format=output_format, output_compression=compression)
    assert response.output_format == output_format
    assert opened(response.data[0]).format == output_format.upper()


def test_output_compression_is_a_quality(client):
    sizes = [
        len(client.images.generate(prompt="[noise]", output_format="jpeg", output_compression=quality).data[0].b64_json)
        for quality in (5, 95)
    ]
    assert sizes[0] < sizes[1] / 2


def test_background(client):
    assert client.images.generate(prompt=PROMPT, background="auto").background == "opaque"
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, background="transparent")
    assert caught.value.param == "background"


def test_response_format_url_is_absolute_and_can_be_fetched(client, server):
    response = client.images.generate(prompt=PROMPT, response_format="url", n=2, extra_body={"seed": 5})
    assert [picture.b64_json for picture in response.data] == [None, None]
    assert response.usage.total_tokens == 51 and response.metrics["seconds"] > 0
    with server.http() as http:
        for picture in response.data:
            assert picture.url.startswith(server.url + "/")
            answer = http.get(picture.url)
            assert answer.headers["content-type"] == "image/png"
            same = client.images.generate(prompt=PROMPT, extra_body={"seed": picture.seed}).data[0]
            assert Image.open(io.BytesIO(answer.content)).tobytes() == opened(same).tobytes()


def test_stream_has_one_completed_event_a_picture(client):
    events = list(client.images.generate(prompt=PROMPT, n=2, stream=True, partial_images=0, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert all(isinstance(event, openai.types.ImageGenCompletedEvent) for event in events)
    plain = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 1})
    assert [event.b64_json for event in events] == [picture.b64_json for picture in plain.data]
    event = events[0]
    assert (event.size, event.quality, event.output_format, event.background) == ("96x64", "medium", "png", "opaque")
    assert event.usage.total_tokens == 51 and event.created_at > 1.7e9 and event.seed == 1


def test_an_error_inside_a_stream(client):
    with pytest.raises(openai.APIError, match="told to fail") as caught:
        list(client.images.generate(prompt="[fail:out_of_memory]", stream=True))
    assert caught.value.code == "out_of_memory"


def test_a_bad_value_is_refused_before_a_stream_begins(client):
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt=PROMPT, stream=True, size="1x1")


def test_what_has_no_effect_is_named(client):
    fields = {"moderation": "low", "style": "vivid", "user": "me", "safety_identifier": "id"}
    response = client.images.generate(prompt=PROMPT, extra_body=fields)
    assert response.warnings == [f"{name} has no effect" for name in fields]


@pytest.mark.parametrize("model", NAMES)
def test_model_is_a_served_name(client, model):
    assert client.images.generate(prompt=PROMPT, model=model).size == "96x64"


@pytest.mark.parametrize("model", ["gpt-image-1", "../secret", "org/tinY", ""])
def test_another_model_is_not_served_all_the_same(client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model=model)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# edits


@pytest.mark.parametrize("as_list", [False, True])
def test_edit(editor, as_list):
    image = [png()] if as_list else png()
    response = editor.images.edit(image=image, prompt="make it blue", n=2, quality="low", extra_body={"seed": 4})
    assert [picture.seed for picture in response.data] == [4, 5]
    assert response.usage.input_tokens_details.image_tokens == 6
    assert response.quality == "low"


def test_edit_takes_a_named_file_and_null_fields(editor):
    image = ("../../etc/passwd\0.svg", png(), "image/svg+xml")
    response = editor.images.edit(image=image, prompt="x", size=None, quality=None, n=None, mask=openai.omit)
    assert response.data[0].b64_json


@pytest.mark.parametrize(("sides", "taller"), [((32, 64), True), ((64, 32), False), ((8, 300), True)])
def test_the_automatic_size_of_an_edit_is_its_inputs_aspect(editor, sides, taller):
    if 8 in sides:
        with pytest.raises(openai.BadRequestError) as caught:
            editor.images.edit(image=png(*sides), prompt="x", size="auto")
        assert caught.value.param == "image"
        return
    response = editor.images.edit(image=png(*sides), prompt="x", size="auto")
    width, height = (int(side) for side in response.size.split("x"))
    assert (height > width) == taller


def test_edit_stream(editor):
    (event,) = editor.images.edit(image=png(), prompt="x", stream=True)
    assert isinstance(event, openai.types.ImageEditCompletedEvent)


def test_edit_as_url(editor):
    assert editor.images.edit(image=png(), prompt="x", response_format="url").data[0].url.startswith("http://127.")


def test_mask_is_refused_where_no_model_uses_it(editor):
    with pytest.raises(openai.BadRequestError) as caught:
        editor.images.edit(image=png(), mask=png(mode="RGBA", color=(0, 0, 0, 0)), prompt="x")
    assert caught.value.param == "mask" and "cannot use a mask" in caught.value.message


def test_two_images_where_one_is_taken(editor):
    with pytest.raises(openai.BadRequestError) as caught:
        editor.images.edit(image=[png(), png()], prompt="x")
    assert caught.value.param == "image"


def test_bracket_forms_are_told_apart(editor):
    with pytest.raises(openai.BadRequestError) as caught:
        editor.images.edit(image=png(), prompt="x", extra_body={"loras": [{"name": "a", "scale": 1.0}]})
    assert caught.value.param == "loras"
    with pytest.raises(openai.BadRequestError) as caught:
        editor.images.edit(image=png(), prompt="x", extra_body={"sigmas": {"a": [1.0]}})
    assert caught.value.param == "sigmas"
    response = editor.images.edit(
        image=png(), prompt="x", extra_body={"sigmas": [1.0, 0.5], "auto_resize": True, "guidance_scale": 2.5}
    )
    assert response.data


# errors


def test_every_attribute_of_an_error(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, size="65x65")
    error = caught.value
    assert error.status_code == 400 and error.code == "invalid_value" and error.param == "size"
    assert error.type == "invalid_request_error"
    assert "multiple of 16" in error.message and "64 and 80" in error.message
    assert str(error.request_id).startswith("req_")


def test_an_unknown_field_suggests_the_nearest(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'negative_prompt'") as caught:
        client.images.generate(prompt=PROMPT, extra_body={"negativ_prompt": "x"})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "negativ_prompt")


def test_a_wrong_key(server):
    with server.openai() as client, pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="sk-secreT").images.generate(prompt=PROMPT)
    assert caught.value.code == "invalid_api_key" and str(caught.value.request_id).startswith("req_")


def test_failures_are_not_sent_again(server):
    before = len(server.engine.submitted)
    with server.openai(max_retries=2) as client, pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="[fail:worker_lost]")
    assert (caught.value.status_code, caught.value.code) == (503, "worker_lost")
    assert len(server.engine.submitted) == before + 1


def test_a_full_queue(tmp_path):
    with running(tmp_path, max_waiting=1) as server, server.openai() as client:
        server.call(lambda: None)
        with server.http() as http:
            jobs = [
                http.post("/v1/images/generations", json={"prompt": "[hold]"}, headers={"prefer": "respond-async"})
                for _ in range(2)
            ]
            assert [job.status_code for job in jobs] == [202, 202]
            server.until(lambda: server.engine.stats.num_waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.generate(prompt=PROMPT)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1


# models


def test_models(client):
    assert [model.id for model in client.models.list()] == [*NAMES]
    model = client.models.retrieve("org/tiny")  # sent as org%2Ftiny
    assert (model.id, model.object, model.owned_by) == ("org/tiny", "model", "safelight")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# videos


def test_list_pages(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA) as server, server.openai() as client:
        ids = [client.videos.create(prompt=PROMPT).id for _ in range(5)]
        assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]  # the SDK asks for each page
        assert [video.id for video in client.videos.list(order="asc", limit=3)] == ids
        page = client.videos.list(limit=2, after=ids[2])
        assert [video.id for video in page.data] == [ids[1], ids[0]] and page.has_more is False
        told = page.model_dump()
        assert (told["last_id"], told["first_id"], told["object"]) == (ids[0], ids[1], "list")
