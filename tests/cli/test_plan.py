"""`safelight plan`: what is printed, from JSON alone."""

import json
import shutil

import pytest

from safelight.cli.main import main
from safelight.loading.repository import SHIPPED_MODEL


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *args])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def without_weights(tmp_path):
    return str(shutil.copytree(SHIPPED_MODEL, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))


def test_the_table(capsys, without_weights):
    code, out, err = run(capsys, without_weights, "--memory-limit", "2GiB", "--size", "128x64")
    assert (code, err) == (0, "")
    for expected in ("transformer", "denoising", "bfloat16", "128x64", "offload=none", "2.00 GiB"):
        assert expected in out


def test_json_has_the_same_in_bytes(capsys, without_weights):
    limit = 256 * 2**20
    _, out, _ = run(capsys, without_weights, "--memory-limit", "8GiB", "--json", "--offload", "components")
    made = json.loads(out)
    assert made["offload"] == "components" and made["memory_limit"] == 8 * 2**30
    assert made["peak"] == max(stage["peak"] for stage in made["stages"]) > 0
    assert made["host_bytes"] == sum(component["bytes"] for component in made["components"].values())
    assert limit < made["memory_limit"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory-limit", "257MiB"], "memory_limit: got '257.00 MiB'; it takes"),
        (["--memory-limit", "much"], "memory_limit: got 'much'"),
        ([], "memory_limit: got None; it takes a size such as 24GiB: there is no device here to ask"),
        (["--memory-limit", "2GiB", "--size", "63x64"], "width: got 63"),
        (["--memory-limit", "2GiB", "--size", "64"], "WIDTHxHEIGHT"),
        (["--memory-limit", "2GiB", "--offload", "some"], "offload: got 'some'"),
        (["--memory-limit", "2GiB", "--offload", "alternates"], "offload: got 'alternates'"),
    ],
)
def test_what_is_refused(capsys, without_weights, args, message):
    code, _, err = run(capsys, without_weights, *args)
    assert code == 2 and message in err
