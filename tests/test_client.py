"""`DiffusionGenerator.connect` and `generate --server`, on a live server: the methods and pictures of in-process."""

from __future__ import annotations

import re
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from safelight import DiffusionGenerator
from safelight.client import ServerError
from safelight.errors import InvalidParameterError, SafelightError
from safelight.media import read_metadata
from tests.live_server import command, environment, fault_model, serving
from tests.serving.stub_engine import IMAGE_SCHEMA

KEY = "a key of more than sixteen characters"
PROMPT = "a small blue star at the top on a yellow background"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("shipped"), None, key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def remote(shipped):
    with DiffusionGenerator.connect(shipped.url, api_key=KEY) as generator:
        yield generator


@pytest.fixture(scope="module")
def local():
    with DiffusionGenerator.from_pretrained(device="cpu") as generator:
        yield generator


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 3},
        {"seed": 5, "n": 2, "num_inference_steps": 4},
        {
            "seed": 1,
            "num_inference_steps": 3,
            "height": 96,
            "width": 160,
            "true_cfg_scale": 2.0,
            "negative_prompt": "red",
        },
        {"seed": 2, "num_inference_steps": 2, "sigmas": (1.0, 0.4)},
    ],
    ids=str,
)
def test_a_server_gives_the_pictures_of_in_process(remote, local, fields):
    theirs, ours = remote.generate(PROMPT, **fields), local.generate(PROMPT, **fields)
    assert len(theirs.images) == len(ours.images) == fields.get("n", 1)
    for one, other in zip(theirs.images, ours.images, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert theirs.seeds == ours.seeds
    assert theirs.params == ours.params
    assert theirs.timings.keys() >= ours.timings.keys()


def test_prompts_forms_and_events(remote, local, tmp_path):
    events = list(remote.stream([PROMPT, "a large red circle at the left on a white background"], seed=4))
    result = events[-1].result
    assert len(result.outputs) == 2 and result.seeds == [4, 4]
    assert {event.output_index for event in events} == {0, 1}
    assert all(event.num_outputs == 2 for event in events)
    steps = [event.step for event in events if event.output_index == 0]
    assert steps == sorted(steps)
    (path, _) = result.save(tmp_path / "made.png")
    assert read_metadata(path)["prompt"] == PROMPT
    as_np = remote.generate(PROMPT, seed=4, output_type="np").images
    as_pt = remote.generate(PROMPT, seed=4, output_type="pt").images
    assert as_np.shape == (1, 128, 128, 3) and as_np.dtype == np.float32
    assert tuple(as_pt.shape) == (1, 3, 128, 128)
    assert np.array_equal((as_np[0] * 255).round().astype(np.uint8), np.asarray(result.images[0]))


def test_mistakes_are_said_as_in_process(remote, local, shipped):
    for fields in ({"width": 65}, {"num_inference_steps": 0}, {"guidance": 1.0}, {"n": -1}):
        said = []
        for generator in (remote, local):
            with pytest.raises(SafelightError) as caught:
                generator.generate(PROMPT, **fields)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]
    with pytest.raises(InvalidParameterError, match="latent"):
        remote.generate(PROMPT, output_type="latent")
    with pytest.raises(SafelightError) as caught:
        DiffusionGenerator.connect(shipped.url, api_key="not the key")
    assert "key" in str(caught.value)
    with pytest.raises(ServerError, match="cannot be reached"):
        DiffusionGenerator.connect("http://127.0.0.1:9")
    with pytest.raises(InvalidParameterError, match="url"):
        DiffusionGenerator.connect("127.0.0.1:8000")
    assert IMAGE_SCHEMA.params_cls is remote.schema.params_cls


def test_the_command_line_lets_a_server_do_it(shipped, local, tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    arguments = ["generate", PROMPT, "--server", shipped.url, "--seed", "9", "-o", str(tmp_path / "a.png")]
    made = subprocess.run(
        command(*arguments, "--api-key-file", str(tmp_path / "key")), capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(tmp_path / "a.png")
    expected = local.generate(PROMPT, seed=9).images[0]
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    refused = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr and "key" in refused.stderr


def test_the_command_line_looks_at_the_folder_before_the_server_works(shipped, tmp_path):
    def num_steps():
        with shipped.http() as http:
            (line,) = re.findall(r"^safelight_step_seconds_count (\S+)", http.get("/metrics").text, re.MULTILINE)
        return float(line)

    (tmp_path / "key").write_text(KEY + "\n")
    before = num_steps()
    for name in ("/proc/a.png", str(tmp_path / "nowhere" / "a.png"), str(tmp_path / "key" / "a.png")):
        arguments = ["generate", PROMPT, "--server", shipped.url, "--api-key-file", str(tmp_path / "key"), "-o", name]
        refused = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
        assert refused.returncode == 2 and "output: folder" in refused.stderr, refused.stderr
    assert num_steps() == before


@pytest.fixture(scope="module")
def slow_video(tmp_path_factory, fault_family):
    folder = tmp_path_factory.mktemp("video")
    model = fault_model(folder / "model", "FaultVideoPipeline", step_seconds=0.05)
    with serving(folder, model) as server:
        yield server


def test_videos_and_leaving_the_stream(slow_video, fault_family, tmp_path):
    assert environment()
    with DiffusionGenerator.connect(slow_video.url) as generator, slow_video.http() as http:
        result = generator.generate("a cat", seed=1, num_frames=9, output_type="np", image=[Image.new("RGB", (8, 8))])
        assert result.videos.shape == (1, 9, 64, 64, 3)
        as_pil = generator.generate("a cat", seed=1, num_frames=9)
        (path,) = as_pil.save(tmp_path / "clip.mp4")
        assert path.read_bytes() == as_pil.outputs[0].files[0]
        assert len(as_pil.videos[0]) == 9
        stream = generator.stream("a long one", num_inference_steps=1000, n=2)
        for event in stream:
            if event.step >= 2:
                break
        del stream, event  # whoever leaves the loop closes it
        jobs = http.get("/v1/videos", params={"limit": 2}).json()["data"]
        assert [job["status"] for job in jobs] == ["failed", "failed"]
        assert {job["error"]["code"] for job in jobs} == {"cancelled"}
        begun = time.monotonic()
        generator.generate("a short one", seed=2)
        assert time.monotonic() - begun < 30
        with pytest.raises(SafelightError) as caught:
            generator.generate("[nan@denoising] a cat")
        assert caught.value.code == "non_finite_output"
