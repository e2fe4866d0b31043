"""What one step may be, in tokens, memory and time, by the model's own numbers; attention counts with its square."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from safelight.core.architecture import Architecture
from safelight.core.stage_memory import StageMemory
from safelight.errors import InvalidParameterError
from safelight.runtime.cost import step_cost
from safelight.runtime.messages import schema_from_wire, schema_to_wire
from safelight.serving.cost import check_cost
from safelight.serving.http_args import HTTPArgs
from safelight.serving.limits import Limits
from tests.serving.http_server import PROMPT, running
from tests.serving.job_server import picture
from tests.serving.schemas import FLUX, params, with_architecture
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, VIDEO_SCHEMA

WAN = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
UNLIMITED = Limits(max_cost=math.inf, max_tokens=2**40, unit_seconds=math.inf)


@pytest.mark.parametrize(
    ("configs", "balance"),
    [
        ({"transformer": FLUX, "vae": {"hidden_size": 1}}, 6 * 3072),
        ({"transformer": WAN}, 2 * 5120 + 13824),
        ({"transformer": {"hidden_size": 1536}}, 6 * 1536),
        ({"unet": {"block_out_channels": [320, 640, 1280]}}, 6 * 1280),
        ({"unet": {"num_attention_heads": [5, 10], "attention_head_dim": None, "block_out_channels": []}}, 6 * 1024),
        ({"vae": {}}, 6 * 1024),
    ],
    ids=str,
)
def test_the_balance_is_the_models_own(configs, balance):
    assert Architecture.of(configs).balance == balance


@pytest.mark.parametrize(
    ("schema", "fields", "param"),
    [
        (IMAGE_SCHEMA, {"height": 16384, "width": 16384}, "size"),
        (IMAGE_SCHEMA, {"height": 8192, "width": 8192}, "size"),
        (VIDEO_SCHEMA, {"height": 128, "width": 192, "num_frames": 8001}, "num_frames"),
    ],
)
def test_a_step_of_too_many_tokens_is_refused(schema, fields, param):
    """A single step, whatever the ceiling on the request's cost is."""
    with pytest.raises(InvalidParameterError, match="tokens, and at most 131,072 are done at once") as caught:
        check_cost(params(schema, **fields), schema, Limits(max_cost=math.inf))
    assert caught.value.param == param


def test_a_step_that_would_take_too_long_is_refused_by_what_steps_took():
    schema, limits = with_architecture(IMAGE_SCHEMA, FLUX), dataclasses.replace(UNLIMITED, unit_seconds=60.0)
    usual, large = params(schema), params(schema, height=4096, width=4096)
    cost_seconds = 59.0 / step_cost(usual, schema)
    check_cost(usual, schema, limits, cost_seconds)
    check_cost(large, schema, limits)  # nothing is known yet
    with pytest.raises(InvalidParameterError, match=r"a step would take about .* and may take 60 s") as caught:
        check_cost(large, schema, limits, cost_seconds)
    assert caught.value.param == "size"


@pytest.mark.parametrize("schema", [IMAGE_SCHEMA, EDIT_SCHEMA, VIDEO_SCHEMA], ids=lambda schema: schema.pipeline_name)
def test_what_steps_took_is_known_at_every_door(tmp_path, schema):
    """With pictures and without, answered at once and as jobs."""
    doors = {"FluxPipeline": "/v1/images/generations", "WanPipeline": "/v1/videos"}
    path = doors.get(schema.pipeline_name, "/v1/images/edits")
    sent: dict[str, Any] = {"json": {"prompt": PROMPT}}
    if schema is EDIT_SCHEMA:
        sent = {"data": {"prompt": PROMPT}, "files": {"image": ("a", picture(), "image/png")}}
    with running(tmp_path, schema) as server, server.http() as http:
        for headers in ({}, {"prefer": "respond-async"}):
            server.engine.cost_seconds = 1e6
            answer = http.post(path, headers=headers, **sent)
            assert answer.status_code == 400 and "a step would take about" in answer.json()["error"]["message"]
            server.engine.cost_seconds = 0.0
            assert http.post(path, headers=headers, **sent).status_code in (200, 202)


def test_a_step_that_cannot_fit_is_refused():
    schema = with_architecture(IMAGE_SCHEMA, FLUX, token_bytes=1 << 20, device_bytes=1 << 30)
    check_cost(params(schema, height=512, width=512), schema, UNLIMITED)
    with pytest.raises(InvalidParameterError, match=r"needs more than .* of memory") as caught:
        check_cost(params(schema, height=1024, width=1024), schema, UNLIMITED)
    assert caught.value.param == "size"


def test_a_stage_that_can_never_fit_is_refused():
    """What was counted of a stage crosses the socket, and grows with pixels and tokens."""
    stages = (StageMemory("text_encoding", 1 << 28, 0, 0), StageMemory("decoding", 0, 3072, 0))
    schema = with_architecture(IMAGE_SCHEMA, FLUX, stage_memory=stages, device_bytes=3 << 30)
    schema = schema_from_wire(schema_to_wire(schema))
    assert schema.stage_memory == stages
    check_cost(params(schema, height=1024, width=1024), schema, UNLIMITED)
    with pytest.raises(InvalidParameterError, match=r"decoding needs about 3.05 GiB of memory, .* 3.00 GiB") as caught:
        check_cost(params(schema, height=1040, width=1024), schema, UNLIMITED)
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("schema", "config", "fields"),
    [
        (IMAGE_SCHEMA, FLUX, {"height": 1024, "width": 1024, "num_inference_steps": 50, "n": 10}),
        (IMAGE_SCHEMA, FLUX, {"height": 4096, "width": 4096, "num_inference_steps": 50}),
        (VIDEO_SCHEMA, WAN, {"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50}),
    ],
)
def test_what_models_are_made_for_is_taken(schema, config, fields):
    schema = with_architecture(schema, config)
    args = HTTPArgs()
    limits = Limits(max_cost=args.max_cost, max_tokens=args.max_tokens)
    assert limits == Limits()
    check_cost(params(schema, **fields), schema, limits)
