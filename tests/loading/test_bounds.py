"""Bounds of what is built: of each tensor once, however often it is registered, and of this thread alone."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from torch import nn

from safelight.errors import ModelIndexError
from safelight.loading import bounds
from safelight.loading.bounds import bounded


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Return a checkpoint of 50 bytes, eight times which may be built."""
    monkeypatch.setattr(bounds, "SPARE_BYTES", 0)
    (tmp_path / "model.safetensors").write_bytes(bytes(50))
    return [tmp_path / "model.safetensors"]


def test_bytes_are_counted_once_a_tensor(weights):
    with bounded("part", weights):
        layer = nn.Linear(10, 9, bias=False)  # 360 bytes
        layer.weight = nn.Parameter(torch.zeros(9, 10))
        with pytest.raises(ModelIndexError, match="far larger model"):
            nn.Linear(10, 9, bias=False)
    nn.Linear(100, 100)


def test_tensors_are_counted(monkeypatch):
    monkeypatch.setattr(bounds, "MAX_TENSORS", 4)
    with bounded("part"):
        nn.Linear(1, 1), nn.Linear(1, 1)
        with pytest.raises(ModelIndexError, match="more than 4 tensors"):
            nn.Module().register_buffer("table", torch.zeros(1))


def test_other_threads_are_left_alone(weights):
    with bounded("part", weights):
        thread = threading.Thread(target=nn.Linear, args=(100, 100))
        thread.start()
        thread.join()


@pytest.mark.parametrize("cls", [transformers.T5EncoderModel, transformers.UMT5EncoderModel])
def test_encoders_that_are_widened_stay_within(tmp_path, monkeypatch, cls):
    """Their embeddings are most of them, held by two modules and read after they were built."""
    monkeypatch.setattr(bounds, "SPARE_BYTES", 0)
    config = cls.config_class(d_model=128, d_ff=128, d_kv=32, num_layers=1, num_heads=4, vocab_size=5000)
    cls(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with bounded("text_encoder", [tmp_path / "model.safetensors"]):
        cls.from_pretrained(tmp_path, dtype=torch.float32, use_safetensors=True)
