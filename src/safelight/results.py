"""What a generation gives back."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safelight import media, video
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import OutputError


def to_form(media: Tensor, output_type: str | None) -> Any:
    """Return a picture [H, W, C] or video [T, H, W, C] in the form asked for; a video's PIL form is a list of frames.

    Latents are returned as they are.
    """
    if output_type == "pil":
        return [to_form(frame, "pil") for frame in media] if media.ndim == 4 else Image.fromarray(media.numpy())
    if output_type == "np":
        return media.numpy()
    return media.movedim(-1, -3) if output_type == "pt" else media


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
        files: a server's video files, which `save` writes as they are where the ending is theirs.

    """

    images: list[Any]
    seed: int
    params: SamplingParams
    timings: Mapping[str, float]
    warnings: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)


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
        """Write every picture or video, with its parameters in the file; several get `-1`, `-2`, ... before the ending.

        Raises:
            OutputError: if one cannot be written; those before it are.

        """
        if self.params.output_type != "pil":
            raise OutputError(f"output_type: got {self.params.output_type!r}; only pil can be written to files")
        makes_video = self.schema.task.makes_video
        made = [
            (entry, output, dict(enumerate(output.files)).get(index))
            for output in self.outputs
            for index, entry in enumerate((*output.images, *output.videos))
        ]
        paths = media.output_paths(Path(path), len(made))
        for target, (entry, _, _) in zip(paths, made, strict=True):
            if makes_video:
                video.check_output(target, overwrite)
            else:
                media.check_output(target, overwrite, entry.has_transparency_data)
        for target, (entry, output, file) in zip(paths, made, strict=True):
            described = output.params.described()
            metadata = media.file_metadata(self.schema.model, self.schema.pipeline_for(described), described)
            if file is not None and target.suffix.lower() == ".mp4":
                video.save_file(file, target, overwrite)
            elif makes_video:
                assert output.params.fps is not None
                frames = np.stack([np.asarray(frame) for frame in entry])
                video.save_video(frames, target, output.params.fps, metadata, overwrite)
            else:
                media.save_image(entry, target, metadata, overwrite)
        return paths


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


def output_from_media(
    media: list[Tensor], params: SamplingParams, timings: Mapping[str, float], warnings: list[str], makes_video: bool
) -> GenerationOutput:
    """Bring media into the form asked for: uint8 for `pil`, else float32, [H, W, C] or [T, H, W, C]; or latents."""
    assert params.seed is not None
    made = [to_form(each, params.output_type) for each in media]
    images, videos = ([], made) if makes_video else (made, [])
    return GenerationOutput(images, params.seed, params, dict(timings), list(warnings), videos)


def output_from_files(
    files: list[bytes], params: SamplingParams, timings: Mapping[str, float], warnings: list[str], makes_video: bool
) -> GenerationOutput:
    """Bring a server's PNG or MP4 files into the form asked for: 8 bits a channel, whatever the form."""
    arrays = [video.read_frames(file) if makes_video else np.array(Image.open(io.BytesIO(file))) for file in files]
    pixels = [torch.from_numpy(array) for array in arrays]
    if params.output_type != "pil":
        pixels = [each / 255 for each in pixels]
    made = output_from_media(pixels, params, timings, warnings, makes_video)
    return replace(made, files=files) if makes_video else made
