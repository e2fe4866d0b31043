"""Models that take no text, by the API's fields and by the command: no prompt is asked for, and one is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from safelight.cli.main import main
from safelight.errors import UnknownParameterError
from safelight.loading.loader import describe
from safelight.loading.repository import open_repository
from safelight.serving.fields import resolve, sort_fields
from safelight.serving.http.bodies import Body
from safelight.serving.http.spool import Spool
from safelight.serving.http_args import HTTPArgs
from safelight.serving.limits import Limits
from safelight.serving.models_api import request_schema
from tests.backends import builders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm")
    torch.manual_seed(0)
    diffusers.DDPMPipeline(**builders.ddpm(folder)).save_pretrained(folder)
    return folder


def asked(folder, **fields):
    schema, limits = describe(open_repository(folder)), Limits()
    body = Body(Spool(folder), is_form=False, is_long=False, fields=fields)
    return resolve(sort_fields(body, schema, limits), limits)


def test_no_prompt_is_asked_for(folder):
    resolved = asked(folder, num_inference_steps=2, seed=1)
    assert resolved.params.prompt is None and resolved.params.seed == 1
    context: Any = SimpleNamespace(schema=lambda: resolved.schema, settings=HTTPArgs(), limits=Limits())
    assert "prompt" not in request_schema(context)["required"]


def test_a_prompt_is_refused(folder):
    with pytest.raises(UnknownParameterError, match="prompt"):
        asked(folder, prompt="a cat", num_inference_steps=2)


def test_the_command_takes_none(folder, tmp_path, capsys):
    path = tmp_path / "x.png"
    line = ["generate", "--model", str(folder), "--num-inference-steps", "2", "--seed", "1", "-o", str(path)]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert (ended.value.code, path.is_file()) == (0, True)
    with pytest.raises(SystemExit) as ended:
        main([*line[:1], "a cat", *line[1:]])
    assert ended.value.code == 2 and "prompt" in capsys.readouterr().err
