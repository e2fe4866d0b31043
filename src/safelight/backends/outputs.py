"""What a pipeline of the package makes: known from the class of its output before a call, and taken from it after."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from safelight.core.sound import Sound
from safelight.errors import ModelIndexError, NonFiniteOutputError, PackageError

PICTURE, VIDEO, SOUND = "picture", "video", "sound"
FIELDS: Mapping[str, str] = {
    **dict.fromkeys(("images", "image", "rgb", "depth", "prediction", "uncertainty"), PICTURE),
    **dict.fromkeys(("frames", "video"), VIDEO),
    **dict.fromkeys(("audios", "audio", "sound"), SOUND),
}
"""Fields of the package's output classes that hold media; others (flags, texts, embeddings, meshes) do not."""
UNSAFE = ("nsfw_content_detected", "nsfw_detected")
RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")
"""What components call the samples a second that they make, the last of them first."""
_NDIM = {PICTURE: 3, VIDEO: 4}
_MAX_CHANNELS = 4
_DOCUMENTED = re.compile(r"\[`~?[\w.]*?(\w+Output)`\]")


def made_by(call: Callable[..., Any], name: str) -> str:
    """Return what a pipeline makes, as the fields of its output's class have it: pictures where there is no class.

    Raises:
        ModelIndexError: where it makes no media: embeddings, meshes, texts.

    """
    cls = output_class(call)
    if cls is None:
        return PICTURE
    fields = [field.name for field in dataclasses.fields(cls)]
    kinds = {FIELDS[field] for field in fields if field in FIELDS}
    if not kinds:
        raise ModelIndexError(
            f"model_index.json: pipeline class {name!r} cannot be run: it makes {', '.join(fields)}, and neither "
            "pictures, nor videos, nor sound"
        )
    return next(kind for kind in (VIDEO, PICTURE, SOUND) if kind in kinds)


def output_class(call: Callable[..., Any]) -> type | None:
    """Return the class of a pipeline's output: the one that its call makes, or else that it is documented to return.

    A call that returns another pipeline's output makes none itself.
    """
    import diffusers
    from diffusers.utils import BaseOutput

    call = inspect.unwrap(call)
    named = [call.__globals__.get(name) for name in call.__code__.co_names]
    documented = _DOCUMENTED.findall(call.__doc__ or "")
    named += [getattr(diffusers, name, None) or getattr(diffusers.pipelines, name, None) for name in documented]
    return next((each for each in named if isinstance(each, type) and issubclass(each, BaseOutput)), None)


def media_of(made: Any, pipe: Any, output_type: str | None) -> list[Tensor | Sound]:
    """Return the media of a pipeline's output.

    Args:
        made: what its call returned.
        pipe: the pipeline, whose components know the rate of a sound.
        output_type: as it was asked for.

    Returns:
        Pictures [H, W, C] and videos [T, H, W, C], float32 in [0, 1], or uint8 for `pil`; sounds; or, for `latent`,
        what the first field with media holds, one output after another.

    Raises:
        NonFiniteOutputError: if there is NaN or infinity in it, which some solvers make of some numbers of steps.
        PackageError: if there is none of these in it.

    """
    fields = {name: value for name, value in made.items() if name in FIELDS and value is not None}
    if output_type == "latent":
        return [as_tensor(entry) for entry in next(iter(fields.values()), ())]
    found: list[Tensor | Sound] = []
    for name, value in fields.items():
        if FIELDS[name] == SOUND:
            found.append(Sound(_waves(as_tensor(value)), rate_of(pipe)))
        else:
            found += [_shown(each, output_type) for each in _entries(value, FIELDS[name])]
    if not found:
        raise PackageError(f"{type(pipe).__name__} made no picture, no video and no sound of these values")
    return found


def as_tensor(value: Any) -> Tensor:
    """Return an array, a picture or a tensor as a tensor on the host, float32 where it is of fewer bits.

    Raises:
        NonFiniteOutputError: if it holds NaN or infinity.

    """
    if isinstance(value, Image.Image):
        value = np.asarray(value, np.float32) / 255
    if isinstance(value, list | tuple):
        value = torch.stack([as_tensor(entry) for entry in value])
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.cpu()
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise NonFiniteOutputError("the model made an output that is not finite; no picture is made of it")
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64) else tensor


def _entries(value: Any, kind: str) -> Iterator[Tensor]:
    """Yield pictures [H, W, C] or videos [T, H, W, C], in whatever lists and batches they stand."""
    if isinstance(value, list | tuple) and not (kind == VIDEO and _ndim(value) == _NDIM[VIDEO]):
        for entry in value:
            yield from _entries(entry, kind)
        return
    tensor = as_tensor(value)
    if tensor.shape[-1] > _MAX_CHANNELS:  # of one channel, which some leave out
        tensor = tensor.unsqueeze(-1)
    size = tensor.shape[-_NDIM[kind] :]
    yield from tensor.reshape(-1, *size) if tensor.ndim >= len(size) else [tensor]


def _ndim(value: Any) -> int:
    if isinstance(value, list | tuple):
        return 1 + max((_ndim(entry) for entry in value), default=0)
    return 3 if isinstance(value, Image.Image) else value.ndim


def _shown(tensor: Tensor, output_type: str | None) -> Tensor:
    """Return pixels as they are asked for; for `pil`, directions from -1 to 1 lie from 0 to 1 too."""
    if output_type != "pil" or not tensor.is_floating_point():
        return tensor
    if tensor.min() < 0:
        tensor = (tensor + 1) / 2
    return (tensor.clamp(max=1) * 255).round().to(torch.uint8)


def _waves(samples: Tensor) -> Tensor:
    """Return a sound [C, S] of the batch of one that a call makes."""
    return samples.float().reshape(-1, samples.shape[-1])


def rate_of(pipe: Any) -> int:
    """Return the samples a second of a pipeline's sound: what it says itself, or else the last network that makes it.

    Raises:
        PackageError: if nothing says it.

    """
    if isinstance(own := vars(pipe).get("sample_rate"), int):
        return own
    networks = [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    for _, network in sorted(networks, key=lambda each: "vocoder" not in each[0]):
        config = getattr(network, "config", {})
        config = config if isinstance(config, Mapping) else vars(config)
        for name in RATES:
            if isinstance(config.get(name), int):
                return int(config[name])
    raise PackageError(f"{type(pipe).__name__}: nothing of this model says the rate of its sound")
