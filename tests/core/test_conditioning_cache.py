"""What the conditioning cache keeps, and by what it finds it again."""

from __future__ import annotations

import os

import pytest
import torch

from safelight import ServerArgs
from safelight.core.conditioning_cache import ConditioningCache
from safelight.errors import InvalidParameterError
from safelight.loading.files import weights_digest


def test_the_oldest_go_first_and_the_bound_holds():
    cache = ConditioningCache(100)
    for number in range(5):
        _, note = cache.put(torch.full((10,), number, dtype=torch.int32), number, "text_encoder", number)
        assert note == number
        cache.get("text_encoder", 0)
    assert cache.num_bytes == 80
    kept = [number for number in range(5) if cache.get("text_encoder", number) is not None]
    assert kept == [0, 4]
    large = torch.zeros(26, dtype=torch.int32)
    assert cache.put(large, None, "text_encoder", "large")[0] is large and cache.get("text_encoder", "large") is None
    view = torch.zeros(1000, dtype=torch.int32)[5:10]
    kept_view, _ = cache.put(view, None, "text_encoder", "view")
    assert kept_view.untyped_storage().nbytes() == 20 and torch.equal(kept_view, view)
    cache.clear()
    assert cache.num_bytes == 0 and cache.get("text_encoder", 4) is None


def test_other_weights_are_another_key(tmp_path):
    weights: dict[str, str] = {}
    cache = ConditioningCache(1000, weights)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = weights_digest(tmp_path)
    weights["vae"] = first
    cache.put(torch.ones(3), None, "vae", "cat")
    assert cache.get("vae", "cat") is not None and cache.get("text_encoder", "cat") is None
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = weights_digest(tmp_path)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert len({first, second, weights_digest(tmp_path)}) == 3
    weights["vae"] = second
    assert cache.get("vae", "cat") is None


@pytest.mark.parametrize("size", ["-1", "0 GiB", "much", ""])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InvalidParameterError, match="conditioning_cache"):
        ServerArgs(conditioning_cache=size)
