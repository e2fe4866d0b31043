"""docs/pipelines.md says what is so: each of its cells is measured again."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from safelight.acceleration.compile import CACHE_VARIABLE
from tests.backends.recipes import requests as asked
from tests.backends.recipes.tinies import TINIES
from tests.pipelines.columns import COLUMN, COLUMNS, YES, Column
from tests.pipelines.subject import Subject, difference
from tests.pipelines.table import PAGE, markdown, read

ROWS = read(PAGE.read_text(encoding="utf-8"))
QUICK = {
    "AmusedPipeline": "tokens in the place of latents",
    "AnimateDiffPipeline": "a network that is made of two",
    "AuraFlowPipeline": "guidance in one call",
    "ChromaImg2ImgPipeline": "a picture, and a mask of the text",
    "CogVideoXPipeline": "frames, and a VAE in pieces of them",
    "DDPMPipeline": "no text, and noise of the solver's own",
    "FluxControlPipeline": "a control image beside the latents",
    "HunyuanVideoPipeline": "two encoders, one of them a language model's",
    "KandinskyV22CombinedPipeline": "pipelines in a pipeline",
    "LatentConsistencyModelPipeline": "noise at every step",
    "MarigoldDepthPipeline": "a picture alone, and a map for a picture",
    "PixArtSigmaPAGPipeline": "a network that the request changes",
    "QwenImagePipeline": "an encoder that sees, and a call a branch",
    "SanaControlNetPipeline": "a second network at each step",
    "SkyReelsV2DiffusionForcingPipeline": "a step for each part of a video",
    "StableAudioPipeline": "sound",
    "StableDiffusionAdapterPipeline": "a network before the loop",
    "VisualClozeGenerationPipeline": "pictures in lists of lists",
    "WanPipeline": "two networks in turn",
    "WanVideoToVideoPipeline": "frames as input",
}
"""A fifth of the classes, and which mechanism each is there for."""
LOADED_ANEW = 3
"""Of how many of these one has what loads it anew measured too."""
MATTERS = 1e-3
"""By how much each input moves what is made, at least."""


def cells() -> list[object]:
    """Return every cell; slow are those that take long, and those of most pipelines."""
    return [
        pytest.param(name, column, id=f"{name}: {column.name}", marks=marks(name, column))
        for name in TINIES
        for column in COLUMNS
    ]


def marks(name: str, column: Column) -> list[pytest.MarkDecorator]:
    """Return a cell's marks."""
    return [pytest.mark.slow] * (not is_quick(name, column))


def is_quick(name: str, column: Column) -> bool:
    """Say whether a cell is measured in `make test`."""
    return name in QUICK and not column.slow and not (column.loads and list(QUICK).index(name) % LOADED_ANEW)


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """Return a pipeline's tiny checkpoint, and what is loaded from it; the last one is kept."""

    @lru_cache(maxsize=1)
    def of(name):
        return Subject(TINIES[name], tmp_path_factory.mktemp(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("inductor")))
        yield of


@pytest.mark.parametrize(("name", "column"), cells())
def test_a_cell_is_what_is_measured(name, column, subject_of):
    assert column.outcome(subject_of(name)) == ROWS[name][column.name]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name, COLUMN["equal"])) for name in TINIES])
def test_every_input_moves_what_is_made(name, subject_of):
    """Or else an equal picture would say nothing of it."""
    subject = subject_of(name)
    fields = asked.fields(subject.tiny)
    whole = subject.expected(1)
    for field, value in fields.items():
        other = another(value)
        if other is not None:
            assert difference(subject.expected(1, **{field: other}), whole) > MATTERS, field


def another(value):
    """Return another text, picture or clip; None of anything else."""
    if isinstance(value, str):
        return f"seven green bottles, {value}"
    if isinstance(value, Image.Image):
        return Image.fromarray(255 - np.asarray(value))
    return [another(each) for each in value] if isinstance(value, list) and another(value[0]) else None


def test_the_page_has_every_pipeline_and_every_column():
    page = PAGE.read_text(encoding="utf-8")
    assert list(ROWS) == list(TINIES) and len(ROWS) >= 60
    assert all(list(row) == list(COLUMN) for row in ROWS.values())
    assert markdown(ROWS) == page
    assert ROWS.keys() >= QUICK.keys() and len(QUICK) >= len(ROWS) / 5


def test_a_quick_cell_says_yes_to_each_thing_that_any_pipeline_can():
    """Where some pipeline can have a thing, one that `make test` measures has it."""
    for column in COLUMNS:
        able = {name for name, row in ROWS.items() if row[column.name].startswith(YES)}
        assert column.slow or not able or any(is_quick(name, column) for name in able), column.name
