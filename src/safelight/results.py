"""What a generation gives back."""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from safelight.core.sound import Sound
from safelight.errors import OutputError


def to_form(media: Tensor, output_type: str | None) -> Any:
    """Return a picture [H, W, C] or video [T, H, W, C] in the form asked for; a video's PIL form is a list of frames.

    Latents are returned as they are.
    """
    if output_type == "pil" and media.ndim == 4:
        return [to_form(frame, "pil") for frame in media]
    if output_type == "pil":
        return Image.fromarray((media.squeeze(-1) if media.shape[-1] == 1 else media).numpy())
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
        files: a server's files of videos and sounds, which `save` writes as they are where the ending is theirs.
        sounds: of the videos, in their order, or alone; samples are a tensor for `pt`, else an array.

    """

    images: list[Any]
    seed: int
    params: SamplingParams
    timings: Mapping[str, float]
    warnings: list[str] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    sounds: list[Sound] = field(default_factory=list)


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
    def sounds(self) -> list[Sound]:
        """Every sound, of a video or alone."""
        return [sound for output in self.outputs for sound in output.sounds]

    @property
    def num_files(self) -> int:
        """As how many files `save` writes it."""
        return sum(len(_to_save(output)) for output in self.outputs)

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
        """Write every picture, video or sound, with its parameters in the file.

        Several get `-1`, `-2`, ... before the ending. A video's sound is in its file.

        Raises:
            OutputError: if one cannot be written; those before it are.

        """
        if self.params.output_type != "pil":
            raise OutputError(f"output_type: got {self.params.output_type!r}; only pil can be written to files")
        made = [
            (entry, output, dict(enumerate(output.files)).get(index))
            for output in self.outputs
            for index, entry in enumerate(_to_save(output))
        ]
        paths = media.output_paths(Path(path), len(made))
        for target, (entry, _, _) in zip(paths, made, strict=True):
            _check_output(entry, target, overwrite)
        for target, (entry, output, file) in zip(paths, made, strict=True):
            described = output.params.described()
            metadata = media.file_metadata(self.schema.model, self.schema.pipeline_for(described), described)
            if file is not None and target.suffix.lower() in (".mp4", ".wav"):
                video.save_file(file, target, overwrite)
            elif isinstance(entry, Sound):
                video.save_sound(entry, target, metadata, overwrite)
            elif isinstance(entry, Image.Image):
                media.save_image(entry, target, metadata, overwrite)
            else:
                frames, sound = entry
                array = np.stack([np.atleast_3d(np.asarray(frame)) for frame in frames])
                video.save_video(array, target, output.params.frames_a_second(), metadata, overwrite, sound)
        return paths


def _to_save(output: GenerationOutput) -> list[Any]:
    """Return what of an output has a file each: pictures, videos with their sounds, or sounds alone."""
    if not output.videos:
        return [*output.images, *output.sounds]
    return [*output.images, *itertools.zip_longest(output.videos, output.sounds[: len(output.videos)])]


def _check_output(entry: Any, path: Path, overwrite: bool) -> None:
    """Refuse a path that an entry cannot be written to."""
    if isinstance(entry, Sound):
        video.check_sound_output(path, overwrite)
    elif isinstance(entry, Image.Image):
        media.check_output(path, overwrite, entry.has_transparency_data)
    else:
        video.check_output(path, overwrite)


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
    media: Sequence[Tensor | Sound],
    params: SamplingParams,
    timings: Mapping[str, float],
    warnings: list[str],
    makes_video: bool,
) -> GenerationOutput:
    """Bring media into the form asked for: uint8 for `pil`, else float32, [H, W, C] or [T, H, W, C]; or latents.

    What has four dimensions is a video; of latents, `makes_video` says it.
    """
    assert params.seed is not None
    made = GenerationOutput([], params.seed, params, dict(timings), list(warnings))
    for each in media:
        if isinstance(each, Sound):
            made.sounds.append(_heard(each, params.output_type))
        else:
            is_video = makes_video if params.output_type == "latent" else each.ndim == 4
            (made.videos if is_video else made.images).append(to_form(each, params.output_type))
    return made


def _heard(sound: Sound, output_type: str | None) -> Sound:
    """Return a sound whose samples are of the kind that is asked for."""
    samples = torch.as_tensor(sound.samples)
    return Sound(samples if output_type == "pt" else samples.numpy(), sound.sampling_rate)


def output_from_files(
    files: list[bytes], params: SamplingParams, timings: Mapping[str, float], warnings: list[str], makes_video: bool
) -> GenerationOutput:
    """Bring a server's PNG, MP4 or WAV files into the form asked for: 8 bits a channel, whatever the form."""
    found: list[Tensor | Sound] = []
    for file in files:
        if file[:4] == b"RIFF" and file[8:12] == b"WAVE":
            sound = video.read_sound(file)
        else:
            is_video = file[4:8] == b"ftyp"
            array = torch.from_numpy(video.read_frames(file) if is_video else np.array(Image.open(io.BytesIO(file))))
            found.append(array if params.output_type == "pil" else array / 255)
            sound = video.read_sound(file) if is_video else None
        found += [] if sound is None else [sound]
    made = output_from_media(found, params, timings, warnings, makes_video)
    return replace(made, files=[] if made.images else files)
