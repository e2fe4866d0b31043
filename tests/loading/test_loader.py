"""A whole model: what it is loaded as, and the settings that do not fit it."""

from __future__ import annotations

import dataclasses

import pytest

from safelight import ServerArgs
from safelight.errors import InvalidParameterError, UsageError
from safelight.loading.files import weights_digest
from safelight.loading.loader import describe, load_pipeline
from safelight.loading.repository import open_repository


def load(folder, **settings):
    return load_pipeline(ServerArgs(str(folder), device="cpu", **settings))


def test_what_is_loaded_is_there_by_name_with_a_digest_and_an_empty_twin(checkpoints):
    components = load(checkpoints.folder()).components
    assert {"transformer", "vae", "tokenizer", "scheduler"} <= components.modules.keys()
    assert components.residency is None and components.over_ranks is None and not components.shares_branches
    assert components.weights.keys() == components.empty.keys() == {
        "transformer", "vae", "text_encoder", "text_encoder_2"
    }  # fmt: skip
    assert components.weights["vae"] == weights_digest(checkpoints.folder() / "vae")
    twin = components.empty["transformer"]()
    assert twin.proj_out.weight.is_meta and twin.proj_out.weight.shape == (
        components.modules["transformer"].proj_out.weight.shape
    )


@pytest.mark.parametrize("backend", ["native", "diffusers"])
def test_a_model_is_described_as_it_is_loaded(checkpoints, backend):
    described = describe(open_repository(checkpoints.folder(), backend=backend, weights=False))
    loaded = load(checkpoints.folder(), backend=backend).schema
    assert described.json_schema() == loaded.json_schema()
    same_params = dataclasses.replace(described, params_cls=loaded.params_cls)  # the package's are made each time
    assert same_params == loaded


def test_several_devices_are_several_ranks(checkpoints):
    with pytest.raises(UsageError, match="as many ranks, which this process does not belong to"):
        load(checkpoints.folder(), tp_size=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"component_dtypes": {"unet": "float32"}}, "component_dtypes: got 'unet'; .* of this model: .*transformer"),
        ({"offload": "blocks"}, "offload: .* none on cpu"),
        ({"memory_limit": "1GiB"}, "memory_limit: .* nothing on cpu"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(checkpoints, settings, words):
    with pytest.raises(InvalidParameterError, match=words):
        load(checkpoints.folder(), **settings)
