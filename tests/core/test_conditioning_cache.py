"""What is kept for later requests: found for the same inputs alone, bounded, the oldest used first to go."""

from __future__ import annotations

import torch
from PIL import Image

from safelight.core.conditioning_cache import ConditioningCache
from safelight.core.params import SamplingParams

BYTES = 40


def made(value):
    return torch.full((10,), float(value))


def test_another_input_another_component_and_other_weights_are_another_key():
    cache = ConditioningCache(10 * BYTES)
    cache.put(made(1), "note", "vae", "a", 1)
    found = cache.get("vae", "a", 1)
    assert found is not None and torch.equal(found[0], made(1)) and found[1] == "note"
    assert cache.get("vae", "a", 2) is None and cache.get("text_encoder", "a", 1) is None
    cache.weights["vae"] = "other"
    assert cache.get("vae", "a", 1) is None
    assert (cache.num_hits, cache.num_misses) == (1, 3)


def test_the_oldest_used_goes_first():
    cache = ConditioningCache(2 * BYTES)
    cache.put(made(1), None, "vae", 1)
    cache.put(made(2), None, "vae", 2)
    assert cache.get("vae", 1) is not None
    cache.put(made(3), None, "vae", 3)
    assert [cache.get("vae", number) is not None for number in (1, 2, 3)] == [True, False, True]
    assert cache.num_bytes == 2 * BYTES
    cache.clear()
    assert cache.num_bytes == 0 and cache.get("vae", 1) is None


def test_what_has_no_room_is_not_kept_and_of_a_view_only_its_own_bytes():
    cache = ConditioningCache(BYTES)
    large = torch.zeros(11)
    assert cache.put(large, None, "vae", 1)[0] is large and cache.get("vae", 1) is None
    cache.put(torch.zeros(100)[:10], None, "vae", 2)
    assert cache.num_bytes == BYTES


def test_images_are_told_apart_by_their_pixels_and_by_what_they_are_prepared_by():
    cache, image = ConditioningCache(1), Image.new("RGB", (4, 2))

    def key(**fields):
        return cache.images_of(SamplingParams(**{"image": (image,), "height": 8, **fields}))

    assert key() == key(image=(image.copy(),)) == key(prompt="x", seed=3, num_inference_steps=9)
    other = image.copy()
    other.putpixel((1, 1), (0, 0, 1))
    different = [
        key(),
        key(image=(other,)),
        key(image=(image.resize((2, 4)),)),
        key(height=16),
        key(image=(image, image)),
    ]
    assert len(set(different)) == len(different)
    assert ConditioningCache(0).images_of(SamplingParams(image=(image,))) == ()
