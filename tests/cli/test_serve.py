"""`safelight serve`: a flag goes before the file, and the file before the defaults."""

from __future__ import annotations

import pytest

from safelight.cli import serve
from safelight.core.server_args import ServerArgs
from safelight.serving.http_args import HTTPArgs


@pytest.fixture
def started(run, monkeypatch):
    """Run the command up to the server; return the settings that it would be given."""
    given: list[tuple[ServerArgs, HTTPArgs]] = []

    class Server:
        def __init__(self, server_args, http_args, say):
            given.append((server_args, http_args))

        async def run(self):
            return 0

    monkeypatch.setattr("safelight.serving.server.Server", Server)

    def start(*arguments):
        ended = run("serve", *arguments)
        assert ended.code == 0, ended.err
        return given.pop()

    return start


def test_flags_and_files_are_the_fields(started, tmp_path):
    assert started() == (ServerArgs(), HTTPArgs())
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nport: 81\noffload: auto\ncomponent_dtypes: {vae: float32}\nkeep_hours: 1\n")
    assert started("--config", file) == (
        ServerArgs("m", offload="auto", component_dtypes={"vae": "float32"}),
        HTTPArgs(port=81, keep_hours=1),
    )
    flags = ("other", "--port", 82, "--offload", "none", "--no-warm-up", "--vae-parallel", "--share", 0.5)
    assert started("--config", file, *flags) == (
        ServerArgs("other", component_dtypes={"vae": "float32"}, vae_parallel=True),
        HTTPArgs(port=82, keep_hours=1, warm_up=False, share=0.5),
    )


def test_variables_stand_for_two_flags(started, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELIGHT_STATE_DIR", "/there")
    monkeypatch.setenv("SAFELIGHT_API_KEY_FILE", "/key")
    assert set(serve.ENVIRONMENT) == {"state_dir", "api_key_file"}
    assert started()[1] == HTTPArgs(state_dir="/there", api_key_file="/key")
    assert started("--state-dir", "/here")[1].state_dir == "/here"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "safelight: port: got 0; it takes a whole number from 1 to 65535\n"),
        (["--dtype", "int8"], "safelight: dtype: got 'int8'; it takes auto, float32, bfloat16, float16\n"),
        (["--prot", "1"], "safelight: No such option '--prot'."),
        (["--config", "/nowhere.yaml"], "safelight: config: '/nowhere.yaml' is no YAML file of settings"),
    ],
)
def test_what_is_wrong_ends_the_start_with_2(run, arguments, says):
    ended = run("serve", *arguments)
    assert ended.code == 2 and ended.err.startswith(says)
