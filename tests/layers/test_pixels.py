"""Pictures as VAEs take them, against Diffusers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from safelight.layers.pixels import image_to_tensor


@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 32), (48, 16)])
def test_a_picture_is_resized_and_scaled_as_the_reference_does(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    made = image_to_tensor(image, height, width)
    assert made.shape == (1, 3, height, width) and made.dtype == torch.float32
    assert torch.equal(made, VaeImageProcessor(vae_scale_factor=8).preprocess(image, height, width))
