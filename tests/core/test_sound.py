"""A sound is a part of a request's output like every tensor."""

from __future__ import annotations

import torch

from safelight.core.sound import Sound
from safelight.core.trees import map_tree


def test_samples_are_a_tensor_of_a_tree():
    sound = Sound(torch.ones(2, 8), 16_000)
    (changed,) = map_tree([sound], lambda tensor: tensor * 2)
    assert isinstance(changed, Sound) and changed.sampling_rate == 16_000 and changed.samples.eq(2).all()
