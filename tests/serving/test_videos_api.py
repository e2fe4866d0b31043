"""Videos as the SDK begins, polls, fetches, remixes and removes them."""

from __future__ import annotations

import base64
import io

import openai
import pytest
from PIL import Image

from tests.serving.http_server import PROMPT, running
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def video_server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("videos"), VIDEO_SCHEMA) as server:
        yield server


@pytest.fixture(scope="module")
def videos(video_server):
    with video_server.openai() as client:
        yield client.videos


def png(width=32, height=48, mode="RGB", color=(200, 10, 10)):
    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, "PNG")
    return file.getvalue()


def test_create_poll_and_download(videos):
    video = videos.create(prompt=PROMPT, size="48x32", seconds="1", model="tiny", extra_body={"seed": 9})
    assert video.id.startswith("video_") and video.object == "video" and video.model == "org/tiny"
    assert video.status in ("queued", "in_progress") and video.progress < 100
    assert (video.size, video.seconds, video.prompt) == ("48x32", "1.125", PROMPT)
    done = videos.poll(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at >= done.created_at and done.expires_at > done.completed_at and done.seed == 9
    content = videos.download_content(video.id).read()
    assert content[4:8] == b"ftyp"
    assert videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert videos.download_content(video.id, variant="spritesheet").read()[:2] == b"\xff\xd8"


def test_create_and_poll_takes_the_servers_interval(videos):
    assert videos.create_and_poll(prompt=PROMPT, seconds="1").status == "completed"


def test_a_failed_video_is_no_http_error(videos):
    failed = videos.create_and_poll(prompt="[fail:out_of_memory]")
    assert failed.status == "failed" and failed.error.code == "out_of_memory" and "told to" in failed.error.message
    with pytest.raises(openai.ConflictError):
        videos.download_content(failed.id)


def test_delete_stops_and_removes(video_server, videos):
    video = videos.create(prompt="[hold]")
    video_server.until(lambda: video_server.engine.stats.num_running == 1)
    deleted = videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    video_server.until(lambda: video_server.engine.stats.num_running == 0)
    for again in (videos.delete, videos.retrieve, videos.download_content):
        with pytest.raises(openai.NotFoundError):
            again(video.id)


def test_content_before_completion_is_a_conflict(video_server, videos):
    video = videos.create(prompt="[hold] early")
    with pytest.raises(openai.ConflictError) as caught:
        videos.download_content(video.id)
    assert caught.value.code == "not_completed"
    videos.delete(video.id)


def test_remix(videos):
    first = videos.create_and_poll(prompt=PROMPT, seconds="2", size="64x48")
    remix = videos.poll(videos.remix(first.id, prompt="a blue circle").id)
    assert remix.status == "completed" and remix.remixed_from_video_id == first.id
    assert (remix.size, remix.seconds, remix.seed) == (first.size, first.seconds, first.seed)
    assert remix.prompt == "a blue circle"


def test_input_reference(tmp_path):
    with running(tmp_path, IMAGE_TO_VIDEO_SCHEMA) as server, server.openai() as client:
        video = client.videos.create_and_poll(prompt=PROMPT, input_reference=("a.png", png()))
        assert video.status == "completed"
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        for reference in (url, {"image_url": url}):  # in JSON, which the SDK does not send
            with server.http() as http:
                answer = http.post("/v1/videos", json={"prompt": PROMPT, "input_reference": reference})
            assert answer.json()["status"] in ("queued", "in_progress")
        remix = client.videos.poll(client.videos.remix(video.id, prompt="again").id)
        assert remix.status == "completed"
        (params,) = [request.params for request in server.engine.submitted if request.params.prompt == "again"]
        assert params.image is not None and params.image[0].size == (32, 48)
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.create(prompt=PROMPT)
        assert caught.value.param == "image"
