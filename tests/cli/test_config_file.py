"""A file of settings: by the names of the fields, of values of their kinds."""

from __future__ import annotations

import pytest

from safelight.cli.config_file import read_config
from safelight.errors import UsageError


@pytest.fixture
def config(tmp_path):
    def written(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return written


def test_settings_of_engine_and_http(config):
    http = "port: 80\nshare: 1\nwarm_up: false\n"
    engine = "model: m\nrevision: 1234567\nmemory_limit: 24GiB\ncomponent_dtypes: {vae: float32}\n"
    assert read_config(config(engine + http)) == {
        "model": "m", "revision": 1234567, "port": 80, "share": 1, "warm_up": False, "memory_limit": "24GiB",
        "component_dtypes": {"vae": "float32"},
    }  # fmt: skip
    assert read_config(config("# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 80", "unknown parameter 'prot': did you mean 'port'"),
        ("port: '80'", "port: got '80'; it takes a value of the kind of 8000"),
        ("warm_up: 1", "warm_up: got 1; it takes a value of the kind of True"),
        ("share: true", "share: got True; it takes a value of the kind of 0.1"),
        ("revision: [a]", "revision: got ['a']; it takes a value of the kind of None"),
        ("component_dtypes: vae", "component_dtypes: got 'vae'; it takes a value of the kind of {}"),
        ("just text", "holds no settings by name"),
        ("a: [", "is no YAML file of settings"),
    ],
)
def test_what_is_wrong_is_named(config, text, says):
    with pytest.raises(UsageError) as caught:
        read_config(config(text))
    assert says in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="is no YAML file of settings"):
        read_config(tmp_path / "none.yaml")
