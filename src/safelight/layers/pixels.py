"""Pictures into tensors, as the VAEs take them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def image_to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """Resize a picture (Lanczos) and return it as float32 [1, C, height, width] in [-1, 1]."""
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)  # H W C
    return 2.0 * pixels.permute(2, 0, 1)[None] - 1.0
