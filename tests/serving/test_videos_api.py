"""Videos as an unmodified `openai` SDK makes, lists, fetches and removes them; and how their length is fitted."""

from __future__ import annotations

import base64

import openai
import pytest

from safelight.serving import videos_api
from tests.serving.http_server import PROMPT, running
from tests.serving.stub_engine import IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA
from tests.serving.wire import png

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def video_server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("videos"), VIDEO_SCHEMA) as server:
        yield server


@pytest.fixture(scope="module")
def videos(video_server):
    with video_server.openai() as client:
        yield client.videos


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


def test_list_pages(tmp_path):
    with running(tmp_path, VIDEO_SCHEMA) as server, server.openai() as client:
        ids = [client.videos.create(prompt=PROMPT).id for _ in range(5)]
        assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]  # the SDK asks for each page
        assert [video.id for video in client.videos.list(order="asc", limit=3)] == ids
        page = client.videos.list(limit=2, after=ids[2])
        assert [video.id for video in page.data] == [ids[1], ids[0]] and page.has_more is False
        told = page.model_dump()
        assert (told["last_id"], told["first_id"], told["object"]) == (ids[0], ids[1], "list")


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


@pytest.mark.parametrize(("seconds", "frames"), [(0.01, 1), (0.5, 5), ("1", 9), (1.2, 9), (1.3, 13), (None, 9)])
def test_a_length_becomes_the_nearest_number_of_frames_that_the_model_makes(video_server, seconds, frames):
    """It makes 1, 5, 9, ... of them, 8 a second."""
    with video_server.http() as http:
        video = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": seconds})
        assert (video.json()["num_frames"], video.json()["seconds"]) == (frames, f"{frames / 8:.6g}")
        assert video.headers["openai-poll-after-ms"] == str(videos_api.POLL_AFTER_MS)
        http.delete(f"/v1/videos/{video.json()['id']}").raise_for_status()
