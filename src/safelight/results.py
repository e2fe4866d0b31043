"""What a generation gives back."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight import media
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import OutputError
from safelight.version import __version__


def to_form(picture: Tensor, output_type: str | None) -> Any:
    """Return one output [H, W, C] of a pipeline in the form asked for; latents as they are."""
    if output_type == "pil":
        return Image.fromarray(picture.numpy())
    if output_type == "np":
        return picture.numpy()
    return picture.permute(2, 0, 1) if output_type == "pt" else picture


def in_batch(pictures: list[Any], output_type: str | None) -> Any:
    """Return a list of PIL images, or one array or tensor with a batch dimension; a list where sizes differ."""
    if output_type == "pil" or not pictures or len({tuple(picture.shape) for picture in pictures}) > 1:
        return pictures
    return np.stack(pictures) if output_type == "np" else torch.stack(pictures)


@dataclass(frozen=True)
class GenerationOutput:
    """One output: one prompt, one seed, and the pictures made of them.

    Attributes:
        images: pictures, in the form asked for: PIL; `np` float32 [H, W, C] in [0, 1]; `pt` [C, H, W]; latents.
        seed: of its noise.
        params: resolved, for this output alone: with them it can be had again.
        timings: seconds of each stage.
        warnings: what concerns this output.
        videos: the same for videos.

    """

    images: list[Any]
    seed: int
    params: SamplingParams
    timings: Mapping[str, float]
    warnings: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class GenerationResult:
    """All outputs of one call.

    Attributes:
        outputs: one for each prompt and seed, the outputs of each prompt in turn.
        params: as they were resolved: what was unset has the model's default, the seed among them.
        schema: of the model that made them.

    """

    outputs: list[GenerationOutput]
    params: SamplingParams
    schema: ModelSchema
    general_warnings: list[str] = field(default_factory=list)

    @property
    def images(self) -> Any:
        """Every picture, flat: a list of PIL images; `np` [N, H, W, C], `pt` [N, C, H, W] or latents [N, ...]."""
        return in_batch([image for output in self.outputs for image in output.images], self.params.output_type)

    @property
    def videos(self) -> Any:
        """Every video, flat."""
        return in_batch([video for output in self.outputs for video in output.videos], self.params.output_type)

    @property
    def seeds(self) -> list[int]:
        """The seed of each output."""
        return [output.seed for output in self.outputs]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage, over all outputs."""
        total: defaultdict[str, float] = defaultdict(float)
        for output in self.outputs:
            for stage, seconds in output.timings.items():
                total[stage] += seconds
        return dict(total)

    @property
    def warnings(self) -> list[str]:
        """What the user should know: each warning once."""
        every = [*self.general_warnings, *(warning for output in self.outputs for warning in output.warnings)]
        return list(dict.fromkeys(every))

    def save(self, path: str | Path, overwrite: bool = False) -> list[Path]:
        """Write every picture, with its parameters in the file; several get `-1`, `-2`, ... before the ending.

        Raises:
            OutputError: if one cannot be written; those before it are.

        """
        if self.params.output_type != "pil":
            raise OutputError(f"output_type: got {self.params.output_type!r}; only pil can be written to files")
        pictures = [(image, output) for output in self.outputs for image in output.images]
        paths = media.output_paths(Path(path), len(pictures))
        for target in paths:
            media.check_output(target, overwrite)
        for target, (image, output) in zip(paths, pictures, strict=True):
            media.save_image(image, target, self.metadata(output), overwrite)
        return paths

    def metadata(self, output: GenerationOutput) -> dict[str, Any]:
        """Return how an output was made, as JSON can hold it."""
        params = output.params.set_fields()
        if output.params.image is not None:
            params["image"] = [f"{image.width}x{image.height}" for image in output.params.image]
        return {
            "software": f"safelight {__version__}",
            "model": self.schema.model,
            "pipeline": self.schema.pipeline_name,
            **{name: value for name, value in params.items() if name not in ("n", "output_type")},
        }


@dataclass(frozen=True)
class GenerationEvent:
    """How far a generation is.

    Attributes:
        stage: the stage that runs.
        step: denoising steps done, of this output.
        num_inference_steps: denoising steps in all, of this output; 0 while that is not known yet.
        output_index: which output is being made, from 0.
        num_outputs: how many there will be.
        result: the result, with the last event; None before.

    """

    stage: str
    step: int
    num_inference_steps: int
    output_index: int
    num_outputs: int
    result: GenerationResult | None = None


def make_output(
    pictures: list[Tensor], params: SamplingParams, timings: Mapping[str, float], warnings: list[str]
) -> GenerationOutput:
    """Bring one request's finished media into the form asked for."""
    assert params.seed is not None
    images = [to_form(picture, params.output_type) for picture in pictures]
    return GenerationOutput(images, params.seed, dataclasses.replace(params), dict(timings), warnings)
