"""OpenAI's own SDK against whole servers: the shipped model, a tiny one that edits, and tiny ones that make videos."""

from __future__ import annotations

import base64
import io

import av
import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from safelight import DiffusionGenerator
from tests.live_server import fault_model, serving
from tests.recipes.flux import KONTEXT
from tests.recipes.wan import WAN

PROMPT = "a large purple square at the center on a white background"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the SDK's, of its own videos
NAMES = ["--served-model-name", "org/tiny,tiny"]


def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def picture(data):
    with Image.open(io.BytesIO(base64.b64decode(data.b64_json))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("shipped"), None, *NAMES) as server:
        yield server


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    KONTEXT.build(folder / "model", "default")
    with serving(folder, folder / "model", "--no-warm-up") as server:
        yield server


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    WAN.build(folder / "model", "default")
    with serving(folder, folder / "model") as server:
        yield server


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    with serving(folder, fault_model(folder / "model", "FaultVideoPipeline", step_seconds=0.05)) as server:
        yield server


def test_pictures_of_the_shipped_model(shipped):
    api = client(shipped)
    answer = api.images.generate(
        prompt=PROMPT, model="org/tiny", n=2, size="auto", quality="auto", user=None, extra_body={"seed": 3}
    )
    assert [data.seed for data in answer.data] == [3, 4]
    assert (answer.size, answer.quality, answer.output_format, answer.background) == (
        "128x128",
        "medium",
        "png",
        "opaque",
    )
    with DiffusionGenerator.from_pretrained(device="cpu") as generator:
        alone = generator.generate(PROMPT, seed=3, n=2).images
    for data, image in zip(answer.data, alone, strict=True):
        assert np.array_equal(picture(data), np.asarray(image))
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    by_url = api.images.generate(prompt=PROMPT, model="tiny", response_format="url", extra_body={"seed": 3})
    fetched = httpx.get(by_url.data[0].url)
    with Image.open(io.BytesIO(fetched.content)) as image:
        assert np.array_equal(np.asarray(image), np.asarray(alone[0]))
    events = list(api.images.generate(prompt=PROMPT, stream=True, extra_body={"seed": 3}))
    assert [event.type for event in events] == ["image_generation.completed"]
    assert np.array_equal(picture(events[0]), np.asarray(alone[0]))


def test_models_and_errors_of_the_shipped_model(shipped):
    api = client(shipped)
    assert [model.id for model in api.models.list()] == ["org/tiny", "tiny"]
    assert api.models.retrieve("org/tiny").id == "org/tiny"
    for fields, param, status in (
        ({"model": "other"}, "model", 404),
        ({"size": "65x65"}, "size", 400),
        ({"n": 0}, "n", 400),
        ({"extra_body": {"sed": 1}}, "sed", 400),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps", 400),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            api.images.generate(prompt=PROMPT, **fields)
        error = caught.value
        assert (error.status_code, error.param) == (status, param)
        assert error.code and error.type and error.request_id and str(error.message)
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.edit(image=b"x", prompt=PROMPT)
    assert caught.value.param == "image"


@pytest.mark.parametrize("several", [False, True])
def test_edits_of_a_real_model(kontext, several):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 90)).save(buffer, "PNG")
    image = [buffer.getvalue()] if several else buffer.getvalue()
    fields = {"seed": 1, "num_inference_steps": 2, "max_area": 64 * 64, "auto_resize": False, "max_sequence_length": 16}
    answer = client(kontext).images.edit(image=image, prompt="make it blue", extra_body=fields)
    assert picture(answer.data[0]).shape[2] == 3 and answer.data[0].seed == 1


def test_a_video_of_a_real_model(wan):
    api = client(wan)
    fields = {"num_frames": 5, "num_inference_steps": 2, "seed": 1, "max_sequence_length": 48}
    video = api.videos.create_and_poll(prompt="a cat", size="80x48", extra_body=fields)
    assert (video.status, video.progress, video.size) == ("completed", 100, "80x48")
    content = api.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content), "r") as container:
        assert len(list(container.decode(video=0))) == 5
    for variant in ("thumbnail", "spritesheet"):
        with Image.open(io.BytesIO(api.videos.download_content(video.id, variant=variant).read())) as image:
            assert image.width >= 80
    again = api.videos.remix(video.id, prompt="a dog")
    assert again.remixed_from_video_id == video.id


def test_the_life_of_videos(videos):
    api = client(videos)
    failed = api.videos.create_and_poll(prompt="[nan@denoising:1] a cat")
    assert (failed.status, failed.error.code) == ("failed", "non_finite_output")
    running = api.videos.create(prompt="a long one", extra_body={"num_inference_steps": 1000})
    assert running.status in ("queued", "in_progress")
    with pytest.raises(openai.ConflictError):
        api.videos.download_content(running.id)
    assert api.videos.delete(running.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.videos.retrieve(running.id)
    made = [api.videos.create_and_poll(prompt=f"cat {index}", seconds="1") for index in range(3)]
    assert {video.status for video in made} == {"completed"} and {video.seconds for video in made} == {"1.125"}
    listed = [video.id for video in api.videos.list(limit=2, order="asc")]
    assert listed == [failed.id, *(video.id for video in made)]
