"""Files with bytes changed anywhere: read, or refused by name; never another exception."""

from __future__ import annotations

import functools
import io
import json
import shutil

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from safelight import ServerArgs, media
from safelight.errors import CheckpointError, InvalidParameterError, ModelIndexError, SafelightError
from safelight.loading.checkpoint import load_weights
from safelight.loading.loader import describe, load_pipeline
from safelight.loading.repository import open_repository
from safelight.runtime.worker.memory_gauge import HostGauge
from safelight.serving.limits import Limits
from tests.backends import builders
from tests.recipes import all_recipes
from tests.uploads import decode_picture

TRIED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def changed(data, changes):
    """Return data with bytes set, cut off, put in, or repeated, each at a place given as a part of its length."""
    for what, part, own in changes:
        place = int(part * len(data))
        if what == "set":
            data = data[:place] + own + data[place + len(own) :]
        elif what == "cut":
            data = data[:place]
        elif what == "insert":
            data = data[:place] + own + data[place:]
        else:
            data = data[:place] + data[max(0, place - 64) : place] * 3 + data[place:]
    return data


def picture(kind):
    image = Image.effect_noise((24, 16), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP")}


@TRIED
@given(kind=st.sampled_from(sorted(PICTURES)), changes=CHANGES, mode=st.sampled_from(["RGB", "RGBA"]))
def test_pictures(tmp_path, kind, changes, mode):
    data = changed(PICTURES[kind], changes)
    path = tmp_path / "picture"
    path.write_bytes(data)
    try:
        made = media.open_image(path, mode=mode)
    except InvalidParameterError as error:
        assert error.param == "image"
    else:
        assert made.mode == mode and made.load() is not None
    try:
        decode_picture(data, "image", Limits())
    except SafelightError as error:
        assert error.exit_code == 2


class Small(nn.Module):
    """What a checkpoint is for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


WEIGHTS = save({"layer.weight": torch.zeros(2, 3), "layer.bias": torch.zeros(2)}, {"format": "pt"})


THROUGH_THE_PACKAGE = {"StableDiffusionPipeline": builders.stable_diffusion, "DDPMPipeline": builders.ddpm}


@pytest.fixture(scope="module")
def repository_of(tmp_path_factory):
    """Return a function that writes a pipeline's tiny checkpoint, once."""

    @functools.cache
    def build(pipeline_name):
        folder = tmp_path_factory.mktemp("hostile")
        if pipeline_name in THROUGH_THE_PACKAGE:
            torch.manual_seed(0)
            made = getattr(diffusers, pipeline_name)(**THROUGH_THE_PACKAGE[pipeline_name](folder))
            made.save_pretrained(folder)
        else:
            all_recipes()[pipeline_name].build(folder, "default")
        return folder

    return build


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "transformer/config.json",
            {"num_layers": 10**7},
            "transformer: .* more than 20,000 tensors",
        ),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}, "text_encoder: .* more than 20,000 tensors"),
        (
            "text_encoder/config.json",
            {"vocab_size": 16 * 10**6},
            "text_encoder: .* far larger model",
        ),
        ("vae/config.json", {"block_out_channels": [8, 2**14]}, "vae: .* far larger model"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**9},
            "num_train_timesteps: got 1000000000",
        ),
        ("tokenizer_2/tokenizer_config.json", {"extra_ids": 2**70}, "tokenizer_2/tokenizer_config.json: extra_ids"),
    ],
    ids=["layers", "layers of a library", "bytes", "bytes that would be drawn", "tables", "tokens"],
)
def test_a_small_file_does_not_take_all_memory(repository_of, file, change, message):
    repository = repository_of("FluxPipeline")
    path = repository / file
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}))
    gauge = HostGauge()
    resident = gauge.begin()
    try:
        with pytest.raises(ModelIndexError, match=message):
            load_pipeline(ServerArgs(str(repository), device="cpu"))
    finally:
        path.write_text(before)
    assert gauge.peak() - resident < 2 << 30


@TRIED
@given(changes=CHANGES)
def test_weights(tmp_path, changes):
    (tmp_path / "model.safetensors").write_bytes(changed(WEIGHTS, changes))
    with torch.device("meta"):
        module = Small()
    try:
        load_weights(module, tmp_path, torch.float32, torch.device("cpu"))
    except CheckpointError:
        return
    assert module.layer.weight.shape == (2, 3) and module.layer.weight.dtype == torch.float32


CLASSES = [
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "DDIMScheduler"),
    ("diffusers", "UNet2DConditionModel"),
    ("diffusers", "FluxPipeline"),
    ("transformers", "AutoModel"),
    ("transformers", "CLIPModel"),
    ("transformers", "CLIPTokenizer"),
    ("stable_diffusion", "StableDiffusionSafetyChecker"),
    ("my_code", "Model"),
]
"""Entries of an index, right and wrong in most places."""
SETTINGS = ["surplus", "quantization_config", "auto_map", "_class_name", "dtype", "architectures", "model_type"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 10**6, 10**9, 2**31, 2**63, 2**70])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(CLASSES).map(list),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    """Yield the paths to everything in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def without(value, path):
    if len(path) == 1:
        rest = dict(value) if isinstance(value, dict) else list(value)
        del rest[path[0]]
        return rest
    return replaced(value, path[:1], without(value[path[0]], path[1:]))


@pytest.mark.parametrize(
    "pipeline_name",
    [
        *("FluxPipeline", "QwenImagePipeline", "WanPipeline", "DDPMPipeline"),
        pytest.param("StableDiffusionPipeline", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
@settings(TRIED, max_examples=40)
@given(data=st.data())
def test_configurations(repository_of, pipeline_name, data):
    """Of the index, components, tokenizers and processors: a value changed, taken away, or put there."""
    repository = repository_of(pipeline_name)
    files = sorted(path for path in repository.rglob("*.json"))
    path = data.draw(st.sampled_from(files))
    before = path.read_text()
    value = json.loads(before)
    place = data.draw(st.sampled_from(sorted(places(value), key=str)))
    change = data.draw(st.sampled_from(["replace", "take", "put"]))
    if change == "take" and place:
        value = without(value, place)
    elif change == "put":
        value = {**value, data.draw(st.sampled_from(SETTINGS)): data.draw(VALUES)}
    else:
        value = replaced(value, place, data.draw(VALUES))
    path.write_text(json.dumps(value))
    try:
        describe(open_repository(repository, weights=False))
        load_pipeline(ServerArgs(str(repository), device="cpu"))
    except SafelightError as error:
        assert error.exit_code in (2, 3)
    finally:
        path.write_text(before)


FILES = st.sampled_from(["diffusion_pytorch_model", "model", "x"]).flatmap(
    lambda stem: st.sampled_from(
        [
            f"{stem}.safetensors",
            f"{stem}.fp16.safetensors",
            f"{stem}.bf16.safetensors",
            f"{stem}.fp16-00001-of-00002.safetensors",
            f"{stem}.safetensors.index.json",
            f"{stem}.safetensors.index.fp16.json",
            f"{stem}.safetensors.bf16.index.json",
            f"{stem}.fp16.bin",
            stem,
        ]
    )
)


@pytest.mark.parametrize(
    "pipeline_name", ["FluxPipeline", pytest.param("StableDiffusionPipeline", marks=pytest.mark.slow)]
)
@settings(TRIED, max_examples=40)
@given(data=st.data())
def test_files_under_other_names(repository_of, tmp_path_factory, pipeline_name, data):
    """Weights renamed, and files of other names beside them: loaded as they are, or refused by name."""
    folder = tmp_path_factory.mktemp("names") / "model"
    shutil.copytree(repository_of(pipeline_name), folder)
    component = data.draw(st.sampled_from(["vae", "text_encoder"]))
    (weights,) = (folder / component).glob("*.safetensors")
    for name in data.draw(st.lists(FILES, min_size=1, max_size=3)):
        content = data.draw(
            st.sampled_from([weights.read_bytes(), b"", b"{}", b'{"weight_map": {"a": "b.safetensors"}}'])
        )
        (folder / component / name).write_bytes(content)
    if data.draw(st.booleans()):
        weights.unlink(missing_ok=True)
    try:
        load_pipeline(ServerArgs(str(folder), variant=data.draw(st.sampled_from([None, "fp16", "../x"])), device="cpu"))
    except SafelightError as error:
        assert error.exit_code in (2, 3) and "\n" not in str(error)
    finally:
        shutil.rmtree(folder)
