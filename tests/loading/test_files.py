"""A model's folder is another's data: what lies there in a file's place, where links lead, and what a file holds."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from safelight.errors import CheckpointError, ModelError, ModelIndexError
from safelight.loading.files import MAX_CONTAINERS, MAX_ENTRIES, MAX_SETTINGS, read_json
from safelight.loading.repository import open_repository
from safelight.runtime.worker.memory_gauge import HostGauge

FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
SECONDS = 10


def as_socket(path, outside):
    with socket.socket(socket.AF_UNIX) as made:
        descriptor = os.open(path.parent, os.O_RDONLY)  # a socket's name has some hundred bytes
        made.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        os.close(descriptor)


def as_circle(path, outside):
    path.symlink_to(path.name + ".other")
    path.with_name(path.name + ".other").symlink_to(path.name)


def up_and_out(path, outside):
    path.symlink_to(os.path.relpath(outside, path.parent))


SPOILED = {
    "a FIFO": lambda path, outside: os.mkfifo(path),
    "a socket": as_socket,
    "a folder": lambda path, outside: path.mkdir(),
    "a link out": lambda path, outside: path.symlink_to(outside),
    "a relative link out": up_and_out,
    "a link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a link to memory": lambda path, outside: path.symlink_to("/proc/self/mem"),
    "a link to nothing": lambda path, outside: path.symlink_to("nothing"),
    "a circle": as_circle,
}


@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_what_is_no_file_of_the_folder_is_refused_and_not_opened(damaged, tmp_path, opened, name, spoil):
    outside = tmp_path / "outside.json"
    (damaged / name).rename(outside)
    spoil(damaged / name, outside)
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        open_repository(damaged)
    assert time.monotonic() - began < SECONDS and "\n" not in str(caught.value)
    for each in opened:
        assert Path(each) != outside and not each.startswith(("/dev/zero", "/proc/self/mem"))
        assert not (Path(each) == damaged / name and (damaged / name).exists())


def test_a_components_folder_does_not_lead_elsewhere(damaged, tmp_path):
    (damaged / "vae").rename(tmp_path / "vae")
    (damaged / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="damaged/vae: a link that leaves the model's folder"):
        open_repository(damaged)


def test_links_within_the_folder_are_followed(damaged):
    (damaged / "vae" / "config.json").rename(damaged / "shared.json")
    (damaged / "vae" / "config.json").symlink_to("../shared.json")
    open_repository(damaged)


def test_folders_in_a_components_are_bounded(damaged):
    (damaged / "vae" / "round").symlink_to("..")
    with pytest.raises(CheckpointError, match="a link to a folder"):
        open_repository(damaged)
    (damaged / "vae" / "round").unlink()
    for number in range(MAX_ENTRIES):
        (damaged / "vae" / str(number)).touch()
    with pytest.raises(CheckpointError, match="more than 2,000 files"):
        open_repository(damaged)


def test_the_cache_of_the_hub_is_made_of_links(checkpoints, tmp_path):
    """Its files are links to blobs beside the snapshots; a blob that is a link itself is none of them."""
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "abc"
    for path in checkpoints.folder().rglob("*"):
        if path.is_file():
            blob = home / "blobs" / hashlib.sha1(str(path).encode()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(checkpoints.folder())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    open_repository(snapshot)
    blob = (snapshot / "vae" / "config.json").resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves the model's folder"):
        open_repository(snapshot)


TEXTS = {
    "a BOM": b'\xef\xbb\xbf{"a": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}',
    "half of a character": b'{"a": "\\ud83d"}',
    "half of one in a name": b'{"\\uDE00": 1}',
    "a name twice": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "names twice": b"{" + b'"a": 1, ' * 50_000 + b'"b": 2}',
    "NaN": b'{"a": [NaN]}',
    "depth": b'{"a": ' + b"[" * 100_000,
    "a long number": b'{"a": ' + b"1" * 5000 + b"}",
    "a list": b"[1]",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_json_of_another_kind_is_refused(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ModelIndexError) as caught:
        read_json(tmp_path / name)
    str(caught.value).encode()


def test_json_that_means_one_thing_is_taken(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude42", "b": -Infinity, "c": {"a": 1}}')
    assert read_json(tmp_path / "config.json") == {"a": "\U0001f642", "b": float("-inf"), "c": {"a": 1}}


def test_files_are_read_within_their_kinds_size(damaged):
    """By the gate before any library, and without memory for them: one is a hole of a terabyte."""
    gauge = HostGauge()
    resident = gauge.begin()
    for name, size in (("config.json", MAX_SETTINGS + 1), ("tokenizer.json", 1 << 40), ("merges.txt", 1 << 40)):
        path = damaged / "tokenizer" / name
        before = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(before)
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"tokenizer/{name}: .* at most"):
            open_repository(damaged)
        if path.suffix == ".json":
            with pytest.raises(ModelIndexError, match="more than"):
                read_json(path)
        path.write_bytes(before)
    (damaged / "tokenizer" / "tokenizer.json").write_text('{"a": [' + "[]," * MAX_CONTAINERS + "1]}")
    with pytest.raises(ModelIndexError, match="lists and objects"):
        open_repository(damaged)
    assert gauge.peak() - resident < 300 << 20
