"""What a pipeline makes is known before its call, and is taken from its output by the names of the fields."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_ldm3d.pipeline_stable_diffusion_ldm3d import LDM3DPipelineOutput
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.marigold.pipeline_marigold_normals import MarigoldNormalsOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, ImagePipelineOutput
from PIL import Image

from safelight.backends.diffusers import describe, pipeline_entry
from safelight.backends.outputs import made_by, media_of, rate_of
from safelight.core.params import SamplingParams
from safelight.core.sound import Sound
from safelight.errors import ModelIndexError, NonFiniteOutputError, PackageError
from safelight.results import GenerationResult, output_from_media

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.random(shape, np.float32)


class Networks:
    """What a pipeline is here: it has components."""

    def __init__(self, **components):
        self.components = components


def vocoder(rate):
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=4, sampling_rate=rate, upsample_initial_channel=16))


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("StableDiffusionXLPipeline", "T2I"),
        ("StableDiffusionXLImg2ImgPipeline", "TI2I"),
        ("VideoToVideoSDPipeline", "TV2V"),
        ("LattePipeline", "T2V"),
        ("WanVideoToVideoPipeline", "TV2V"),
        ("AnimateDiffVideoToVideoPipeline", "TV2V"),
        ("WanAnimatePipeline", "TI2V"),
        ("SanaVideoPipeline", "T2V"),
        ("AudioLDM2Pipeline", "T2A"),
        ("MarigoldDepthPipeline", "I2I"),
        ("KandinskyV22CombinedPipeline", "T2I"),
        ("LTX2Pipeline", "T2V"),
        ("Kandinsky5T2IPipeline", "T2I"),
    ],
)
def test_the_task_is_what_is_made(name, task):
    """Not whether the call takes a number of frames: several that make videos do not."""
    assert describe("m", name, pipeline_entry(name).sampling_param_cls(), ()).task == task


@pytest.mark.parametrize(
    ("name", "makes"),
    [
        ("KandinskyV22PriorPipeline", "image_embeds"),
        ("FluxPriorReduxPipeline", "prompt_embeds"),
        ("LLaDA2Pipeline", "texts"),
        ("StableCascadePriorPipeline", "image_embeddings"),
    ],
)
def test_what_is_no_medium_is_refused_by_name(name, makes):
    with pytest.raises(ModelIndexError, match=f"{name}.*{makes}"):
        made_by(getattr(diffusers, name).__call__, name)


MADE = {
    "pictures": (ImagePipelineOutput(images=noise(2, 8, 6, 3)), [(8, 6, 3)] * 2, [".png"] * 2),
    "several frames a picture": (ImagePipelineOutput(images=[[noise(8, 6, 3)] * 2]), [(8, 6, 3)] * 2, [".png"] * 2),
    "in a batch of frames": (ImagePipelineOutput(images=noise(1, 3, 8, 6, 3)), [(8, 6, 3)] * 3, [".png"] * 3),
    "PIL": (ImagePipelineOutput(images=[Image.new("RGB", (6, 8), "red")]), [(8, 6, 3)], [".png"]),
    "grey": (ImagePipelineOutput(images=noise(1, 8, 6, 1)), [(8, 6, 1)], [".png"]),
    "depth beside colours": (LDM3DPipelineOutput(noise(1, 8, 6, 3), noise(1, 8, 6), None), None, [".png"] * 2),
    "directions": (MarigoldNormalsOutput(2 * noise(1, 8, 6, 3) - 1, None, None), [(8, 6, 3)], [".png"]),
    "a video": (LTX2PipelineOutput(frames=noise(1, 5, 8, 6, 3), audio=None), [(5, 8, 6, 3)], [".mp4"]),
    "a video without a batch": (LTX2PipelineOutput(frames=noise(5, 8, 6, 3), audio=None), [(5, 8, 6, 3)], [".mp4"]),
    "a video in lists": (
        LTX2PipelineOutput(frames=[[Image.new("RGB", (6, 8))] * 5], audio=None),
        [(5, 8, 6, 3)],
        [".mp4"],
    ),
    "a video with sound": (
        LTX2PipelineOutput(frames=noise(1, 5, 8, 6, 3), audio=torch.rand(1, 2, 4000)),
        [(5, 8, 6, 3), (2, 4000)],
        [".mp4"],
    ),
    "sound": (AudioPipelineOutput(audios=noise(1, 4000) - 0.5), [(1, 4000)], [".wav"]),
    "sound of two channels": (AudioPipelineOutput(audios=noise(1, 2, 4000) - 0.5), [(2, 4000)], [".wav"]),
}


@pytest.mark.parametrize("case", MADE)
def test_every_medium_is_taken_and_can_be_saved(tmp_path, case):
    made, shapes, endings = MADE[case]
    pipe = Networks(vae=torch.nn.Linear(1, 1), vocoder=vocoder(8000))
    arrays = media_of(made, pipe, "np")
    assert shapes is None or [tuple(samples_of(each).shape) for each in arrays] == shapes
    shown = media_of(made, pipe, "pil")
    for exact, each in zip(arrays, shown, strict=True):
        if isinstance(each, Sound):
            assert each.sampling_rate == 8000 and torch.equal(each.samples, samples_of(exact))
        elif case != "directions":  # which are shown from 0 to 1
            assert each.dtype == torch.uint8 and (each / 255 - samples_of(exact)).abs().max() <= 0.5 / 255 + 1e-6
    params = SamplingParams(seed=1, n=1, output_type="pil")
    schema = describe("m", "LTX2Pipeline", pipeline_entry("LTX2Pipeline").sampling_param_cls(), ())
    result = GenerationResult([output_from_media(shown, params, {}, [], False)], params, schema)
    paths = result.save(tmp_path / f"made{endings[0]}")
    assert [path.suffix for path in paths] == endings and result.num_files == len(endings)


def samples_of(each):
    return each.samples if isinstance(each, Sound) else each


def test_latents_are_as_they_are():
    latents = torch.randn(1, 4, 2, 2)
    (made,) = media_of(ImagePipelineOutput(images=latents), Networks(), "latent")
    assert torch.equal(samples_of(made), latents[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_no_medium(value):
    for made in (ImagePipelineOutput(np.full((1, 4, 4, 3), value)), AudioPipelineOutput(np.full((1, 8), value))):
        with pytest.raises(NonFiniteOutputError):
            media_of(made, Networks(vocoder=vocoder(8000)), "pil")


def test_nothing_made_and_a_sound_without_a_rate_are_named():
    with pytest.raises(PackageError, match="made no picture"):
        media_of(ImagePipelineOutput(images=None), Networks(), "pil")
    with pytest.raises(PackageError, match="rate of its sound"):
        rate_of(Networks(vae=torch.nn.Linear(1, 1)))
