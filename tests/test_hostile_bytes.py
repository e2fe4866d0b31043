"""Files with bytes changed anywhere: read, or refused by name; never another exception."""

from __future__ import annotations

import functools
import io
import json

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
from safelight.loading.loader import load_pipeline
from safelight.runtime.room import HostGauge
from safelight.serving.limits import Limits
from safelight.serving.pictures import decode_picture
from tests.recipes import all_recipes

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


@pytest.fixture(scope="module")
def repository_of(tmp_path_factory):
    """Return a function that writes a pipeline's tiny checkpoint, once."""

    @functools.cache
    def build(pipeline_name):
        folder = tmp_path_factory.mktemp("hostile")
        all_recipes()[pipeline_name].build(folder, "default")
        return folder

    return build


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "transformer/config.json",
            {"num_layers": 10**9},
            "transformer: .* more than 20,000 tensors",
        ),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "text_encoder: .* more than 20,000 tensors"),
        (
            "text_encoder/config.json",
            {"vocab_size": 2 * 10**8},
            "text_encoder: .* far larger model",
        ),
        ("vae/config.json", {"block_out_channels": [8, 2**14]}, "vae: .* far larger model"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**9},
            "num_train_timesteps: got 1000000000",
        ),
    ],
    ids=["layers", "layers of a library", "bytes", "bytes that would be drawn", "tables"],
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


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 10**6, 10**9, 2**31, 2**63, 2**70])
    | st.floats()
    | st.text(max_size=8),
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


@pytest.mark.parametrize("pipeline_name", ["FluxPipeline", "QwenImagePipeline", "WanPipeline"])
@pytest.mark.filterwarnings("ignore")
@settings(TRIED, max_examples=50)
@given(data=st.data())
def test_configurations(repository_of, pipeline_name, data):
    repository = repository_of(pipeline_name)
    files = sorted(path for path in repository.rglob("*.json") if "tokenizer" not in path.parent.name)
    path = data.draw(st.sampled_from(files))
    before = path.read_text()
    place = data.draw(st.sampled_from(sorted(places(json.loads(before)), key=str)))
    path.write_text(json.dumps(replaced(json.loads(before), place, data.draw(VALUES))))
    try:
        load_pipeline(ServerArgs(str(repository), device="cpu"))
    except SafelightError as error:
        assert error.exit_code in (2, 3)
    finally:
        path.write_text(before)
