"""Masks over HTTP, by OpenAI's SDK and as the package has them: of a model whose index names text to image alone."""

from __future__ import annotations

import base64
import io
import json
import time

import diffusers
import numpy as np
import openai
import pytest
import torch
from diffusers import ControlNetModel
from openai import OpenAI
from PIL import Image

from safelight import DiffusionGenerator
from tests.backends import builders
from tests.live_server import serving

SIZE = (64, 32)
FIELDS = {"num_inference_steps": 3, "strength": 0.9, "seed": 5}
PICTURE = Image.linear_gradient("L").resize(SIZE).convert("RGB")
CONTROL = Image.radial_gradient("L").resize(SIZE).convert("RGB")
MASK = Image.new("RGBA", SIZE, (9, 9, 9, 255))
MASK.paste((0, 0, 0, 0), (16, 0, 48, 32))
WHITE = Image.new("L", SIZE, 0)
WHITE.paste(255, (16, 0, 48, 32))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image):
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def picture(answer):
    return pixels(base64.b64decode(answer["data"][0]["b64_json"]))


def reference(folder, cls="StableDiffusionInpaintPipeline", **fields):
    pipe = getattr(diffusers, cls).from_pretrained(folder, **fields.pop("more", {}))
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(fields.pop("seed"))
    return np.asarray(pipe("a cat", generator=seed, **fields).images[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(**builders.stable_diffusion(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), folder, "--no-warm-up") as server:
        yield server


@pytest.fixture(scope="module")
def expected(folder):
    return reference(folder, image=PICTURE, mask_image=WHITE, height=32, width=64, **FIELDS)


def test_an_edit_with_a_mask_by_the_sdk(server, folder, expected):
    api = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer = api.images.edit(
        image=png(PICTURE), mask=png(MASK), prompt="a cat", size="64x32", extra_body={**FIELDS, "stream": False}
    )
    assert np.array_equal(picture(answer.model_dump()), expected)
    unmasked = api.images.edit(image=png(PICTURE), prompt="a cat", extra_body=FIELDS)
    wanted = reference(folder, "StableDiffusionImg2ImgPipeline", image=PICTURE, **FIELDS)
    assert np.array_equal(picture(unmasked.model_dump()), wanted) and not np.array_equal(wanted, expected)
    text = api.images.generate(
        prompt="a cat", size="64x32", extra_body={name: FIELDS[name] for name in ("num_inference_steps", "seed")}
    )
    fields = {"height": 32, "width": 64, "num_inference_steps": 3, "seed": 5}
    assert np.array_equal(picture(text.model_dump()), reference(folder, "StableDiffusionPipeline", **fields))
    for wrong, says in ((png(WHITE), "without transparency"), (png(MASK.resize((32, 32))), "of the size of image")):
        with pytest.raises(openai.BadRequestError) as caught:
            api.images.edit(image=png(PICTURE), mask=wrong, prompt="a cat", extra_body=FIELDS)
        assert caught.value.param == "mask" and says in str(caught.value)


def test_masks_in_every_form_of_request(server, expected):
    fields = {"prompt": "a cat", "size": "64x32", **FIELDS}
    with server.http() as http:
        for mask in ({"mask": data_url(MASK)}, {"mask_image": data_url(WHITE)}):
            body = {**fields, "images": [{"image_url": data_url(PICTURE)}], **mask}
            assert np.array_equal(picture(http.post("/v1/images/edits", json=body).json()), expected)
            body = {**fields, "image": [data_url(PICTURE)], **mask}
            assert np.array_equal(picture(http.post("/v1/images/generations", json=body).json()), expected)
        files = {"image": ("a.png", png(PICTURE)), "mask_image": ("b.png", png(WHITE))}
        answer = http.post("/v1/images/edits", data={name: str(value) for name, value in fields.items()}, files=files)
        assert np.array_equal(picture(answer.json()), expected)
        files["mask"] = ("c.png", png(MASK))
        answer = http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mask")
        answer = http.post("/v1/images/generations", json={**fields, "strength": 0.5})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "strength")
        schema = http.get(f"/v1/models/{http.get('/v1/models').json()['data'][0]['id']}/schema").json()
    assert [each["selectedBy"] for each in schema["x-pipelines"]] == [[], ["image"], ["image", "mask_image"]]
    assert {"mask", "mask_image", "strength"} <= schema["properties"].keys()


def test_an_edit_with_a_mask_as_a_job(server, expected):
    files = {"image": ("a.png", png(PICTURE)), "mask": ("b.png", png(MASK))}
    data = {"prompt": "a cat", "size": "64x32", **{name: str(value) for name, value in FIELDS.items()}}
    with server.http() as http:
        job = http.post("/v1/images/edits", data=data, files=files, headers={"prefer": "respond-async"}).json()
        end = time.monotonic() + 60
        while (found := http.get(f"/v1/jobs/{job['id']}").json())["state"] != "completed":
            assert found["state"] != "failed" and time.monotonic() < end, found
            time.sleep(0.05)
        content = http.get(f"/v1/jobs/{job['id']}/content").content
    assert np.array_equal(pixels(content), expected)
    with Image.open(io.BytesIO(content)) as image:
        assert json.loads(image.text["parameters"])["pipeline"] == "StableDiffusionInpaintPipeline"  # type: ignore[attr-defined]


def test_our_own_client_takes_the_same(server, expected):
    fields = {"image": PICTURE, "mask": MASK, "height": 32, "width": 64, **FIELDS}
    with DiffusionGenerator.connect(server.url) as generator:
        result = generator.generate("a cat", **fields)
        defaults = generator.generate("a cat", image=PICTURE, num_inference_steps=3, seed=1).params
    assert np.array_equal(np.asarray(result.images[0]), expected)
    assert (defaults.set_fields()["strength"], defaults.height) == (0.8, None)


@pytest.mark.slow
def test_a_server_with_a_component_from_elsewhere(folder, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(1)
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).save_pretrained(tmp_path / "control")
    cls = "StableDiffusionControlNetPipeline"
    options = ("--pipeline", cls, "--component", f"controlnet={tmp_path / 'control'}", "--no-warm-up")
    more = {"controlnet": ControlNetModel.from_pretrained(tmp_path / "control")}
    with serving(tmp_path, folder, *options) as server, server.http() as http:
        body = {"prompt": "a cat", "image": [data_url(CONTROL)], "num_inference_steps": 3, "seed": 2}
        answer = http.post("/v1/images/generations", json=body).json()
        wanted = reference(folder, cls, more=more, image=CONTROL, num_inference_steps=3, seed=2)
        assert np.array_equal(picture(answer), wanted)
        data = {"prompt": "a cat", "size": "64x32", **{name: str(value) for name, value in FIELDS.items()}}
        files = {name: ("x.png", png(image)) for name, image in (("image", PICTURE), ("control_image", CONTROL))}
        answer = http.post("/v1/images/edits", data=data, files=files).json()
        inputs = {"image": PICTURE, "control_image": CONTROL, "height": 32, "width": 64}
        wanted = reference(folder, "StableDiffusionControlNetImg2ImgPipeline", more=more, **inputs, **FIELDS)
        assert np.array_equal(picture(answer), wanted)
