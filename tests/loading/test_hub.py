"""Models by their Hub id, through huggingface_hub's own client and a Hub on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from safelight import DiffusionGenerator, ServerArgs
from safelight.cli.main import main
from safelight.errors import (
    InvalidParameterError,
    ModelAccessError,
    ModelError,
    ModelIndexError,
    ModelNotFoundError,
)
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from tests.loading.local_hub import Repo, serve

ID = "studio/tiny-flux"
TOKEN = "hf_secret"
UNWANTED = (
    "README.md",
    "flux1-dev.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/model.py",
    "vae/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "safety_checker/model.safetensors",
    "onnx/model.onnx",
)


@pytest.fixture(scope="session")
def repositories(checkpoints, tmp_path_factory):
    """Folders as they lie on a Hub: `main`, and `v2` with other weights; both with files that nobody needs."""
    root = tmp_path_factory.mktemp("hub")
    folders = {
        "main": checkpoints.copy(root / "main"),
        "v2": checkpoints.copy(root / "v2", "schnell"),
    }
    for folder in folders.values():
        for name in UNWANTED:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"not for us")
    return folders


@pytest.fixture(scope="session")
def server():
    server, hub = serve()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, repositories, tmp_path, monkeypatch):
    """The Hub with one public repository, an empty cache, and no token."""
    server.repos, server.broken = {ID: Repo(repositories)}, False
    server.requests.clear()
    connect(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return server


def connect(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def load(model, revision=None):
    return load_pipeline(ServerArgs(model, revision, device="cpu"))


def same_weights(one, other):
    components = ("transformer", "vae", "text_encoder", "text_encoder_2")
    pairs = [(one.get_module(name).state_dict(), other.get_module(name).state_dict()) for name in components]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


@pytest.mark.parametrize(
    ("model", "revision", "branch"),
    [(ID, None, "main"), (f"{ID}@v2", None, "v2"), (ID, "v2", "v2"), (f"{ID}@COMMIT", None, "v2")],
    ids=["id", "id@branch", "revision", "id@commit"],
)
def test_an_id_gives_the_weights_of_the_folder(hub, repositories, model, revision, branch):
    commit, folder = hub.repos[ID].find(branch)
    assert same_weights(load(model.replace("COMMIT", commit), revision), load(str(folder)))


def needed(folder, weights):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - set(UNWANTED)
    return {name for name in files if weights or not name.endswith(".safetensors")}


@pytest.mark.parametrize("weights", [True, False])
def test_only_what_is_needed_is_downloaded(hub, repositories, weights):
    path = open_repository(ID, weights=weights).path
    assert hub.files_sent() == needed(repositories["main"], weights)
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == hub.files_sent()


HALF = ("transformer", "vae", "text_encoder", "text_encoder_2")


def add_variants(folder, components, keep):
    """Copy, or move, weights to a variant, as whole files."""
    for component in components:
        (plain,) = (folder / component).glob("*model.safetensors")
        copy = plain.with_name(plain.name.replace(".safetensors", ".fp16.safetensors"))
        copy.write_bytes(plain.read_bytes())
        if not keep:
            plain.unlink()


@pytest.fixture
def variants(hub, checkpoints, tmp_path):
    """Return a function that puts a repository with variants on the Hub, and returns its folder."""

    def put(components=HALF, keep=False):
        folder = checkpoints.copy(tmp_path / "variants")
        add_variants(folder, components, keep)
        hub.repos[ID] = Repo({"main": folder})
        return folder

    return put


def weights_sent(hub):
    return {name for name in hub.files_sent() if name.endswith(".safetensors")}


def test_the_only_variant_is_downloaded(hub, variants, monkeypatch):
    folder = variants()
    assert same_weights(load(ID), load(str(folder)))
    assert len(weights_sent(hub)) == 4 and all(".fp16." in name for name in weights_sent(hub))
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load(ID), load(str(folder)))
    assert hub.requests == []


@pytest.mark.parametrize(("asked", "word"), [(None, "model.safetensors"), ("fp16", "model.fp16.safetensors")])
def test_the_variant_that_is_asked_for_is_downloaded_alone(hub, variants, asked, word):
    variants(keep=True)
    path = open_repository(ID, variant=asked).path
    assert len(weights_sent(hub)) == 4 and all(name.endswith(word) for name in weights_sent(hub))
    assert {str(file.relative_to(path)) for file in path.rglob("*.safetensors")} == weights_sent(hub)


def test_one_component_with_a_variant_alone_is_downloaded(hub, variants):
    folder = variants(components=("vae",))
    assert same_weights(load(ID), load(str(folder)))
    assert {name for name in weights_sent(hub) if ".fp16." in name} == {"vae/diffusion_pytorch_model.fp16.safetensors"}


def test_a_variant_that_is_not_on_the_hub(hub, variants):
    variants()
    with pytest.raises(InvalidParameterError, match="variant: got 'bf16'; it takes fp16"):
        open_repository(ID, variant="bf16")
    assert weights_sent(hub) == set()


def test_offline_with_a_cache_without_weights_of_a_variant(hub, variants, monkeypatch):
    variants()
    open_repository(ID, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="not wholly, in the cache"):
        open_repository(ID)


def test_schema_downloads_no_weights(hub, repositories, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["schema", ID])
    assert hub.files_sent() == needed(repositories["main"], weights=False)
    assert '"title": "FluxPipeline"' in capsys.readouterr().out


def test_the_second_time_needs_no_hub(hub, repositories, monkeypatch):
    load(ID)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load(ID), load(str(repositories["main"])))
    assert hub.requests == []


def test_a_private_repository_opens_with_the_token(hub, monkeypatch):
    hub.repos[ID].token = TOKEN
    with pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
        open_repository(ID)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    open_repository(ID)
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}


def gated(hub):
    hub.repos[ID].gated = True


def missing(hub):
    hub.repos.clear()


def without_index(hub):
    hub.repos[ID].revisions = {"main": hub.repos[ID].revisions["main"] / "vae"}


def no_fault(hub):
    """Leave the Hub as it is: the fault is in the question."""


FAILURES = {
    "gated": (gated, ID, ModelAccessError, ["accept its terms", "HF_TOKEN"]),
    "missing": (missing, ID, ModelNotFoundError, ["no such repository", "HF_TOKEN"]),
    "missing revision": (no_fault, f"{ID}@v9", ModelNotFoundError, [ID, "no revision 'v9'"]),
    "no index": (without_index, ID, ModelIndexError, ["no model_index.json", "Diffusers layout"]),
    "no id": (no_fault, f"{ID}.git", ModelError, ["cannot end by '.git'"]),
}


@pytest.mark.parametrize(("fault", "model", "error", "words"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_one_line_that_says_what_to_do(hub, capsys, tmp_path, fault, model, error, words):
    fault(hub)
    with pytest.raises(error) as caught:
        DiffusionGenerator.from_pretrained(model)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", "--model", model, "-o", str(tmp_path / "x.png")])
    assert ended.value.code == 3
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"safelight: {caught.value}\n")


def test_a_token_that_is_not_enough(hub, monkeypatch):
    gated(hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ModelAccessError, match="accept its terms"):
        open_repository(ID)


def test_offline_with_an_empty_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
        open_repository(ID)
    assert hub.requests == []


def test_offline_with_half_a_cache(hub, monkeypatch):
    """What `safelight schema` left there is not taken for the model."""
    open_repository(ID, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="not wholly, in the cache"):
        open_repository(ID)


def no_sleep(monkeypatch):
    """Let the client try again at once, and count its waits."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_a_line_that_goes_dead_leaves_no_half_file(hub, repositories, monkeypatch):
    waits = no_sleep(monkeypatch)
    hub.repos[ID].cut = frozenset({"transformer/diffusion_pytorch_model.safetensors"})
    with pytest.raises(ModelError, match=f"{ID} could not be downloaded"):
        open_repository(ID)
    assert waits, "the client tries again before it gives up"
    hub.repos[ID].cut = frozenset()
    assert same_weights(load(ID), load(str(repositories["main"])))


@pytest.mark.parametrize("broken", ["nobody there", "503"])
def test_an_endpoint_that_is_down_ends_within_30_seconds(hub, monkeypatch, broken):
    waits = no_sleep(monkeypatch)
    hub.broken = broken == "503"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        if not hub.broken:
            connect(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(ModelNotFoundError, match="out of reach"):
            open_repository(ID)
    assert 0 < sum(waits) + time.monotonic() - begun < 30


def test_an_endpoint_that_is_no_address(hub, monkeypatch):
    connect(monkeypatch, "huggingface.co")
    with pytest.raises(ModelError, match=r"could not be downloaded: .*http"):
        open_repository(ID)


@pytest.mark.parametrize(
    ("model", "revision", "takes"),
    [(f"{ID}@v2", "main", "beside the 'v2'"), ("FOLDER", "v2", "a folder has no revisions")],
)
def test_a_revision_that_would_be_ignored_is_refused(hub, repositories, model, revision, takes):
    with pytest.raises(InvalidParameterError, match=takes):
        open_repository(model.replace("FOLDER", str(repositories["main"])), revision)


def test_environment_is_respected(hub, repositories, tmp_path):
    """The console script, with the variables that people set."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    script, picture = Path(sys.executable).with_name("safelight"), tmp_path / "x.png"
    command = [str(script), "generate", "x", "--model", ID, "--height", "16", "--width", "16"]
    command += ["--num-inference-steps", "1", "-o", str(picture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, f"{picture}\n"), done.stderr
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert hub.files_sent() == needed(repositories["main"], weights=True)
    assert list((tmp_path / "home" / "hub").glob("models--*"))
