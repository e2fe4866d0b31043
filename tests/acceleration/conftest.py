"""Tiny models with settings, and a cache of compiled code that the session's processes share."""

from __future__ import annotations

import json

import pytest

from safelight import ServerArgs
from safelight.acceleration.compile import CACHE_VARIABLE
from safelight.loading.loader import load_pipeline
from tests.recipes import all_recipes


@pytest.fixture(scope="session", autouse=True)
def inductor_cache(tmp_path_factory):
    """Keep what is compiled out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("inductor")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return a function that builds a pipeline's tiny checkpoint, once."""
    root, built = tmp_path_factory.mktemp("compiled"), {}

    def folder(pipeline_name):
        if pipeline_name not in built:
            built[pipeline_name] = root / pipeline_name
            all_recipes()[pipeline_name].build(built[pipeline_name], "default")
        return built[pipeline_name]

    return folder


@pytest.fixture
def tiny(tiny_folder):
    """Return a function that loads a tiny model with settings."""
    return lambda name, **settings: load_pipeline(ServerArgs(str(tiny_folder(name)), **{"device": "cpu", **settings}))


@pytest.fixture
def tiny_flux(tiny):
    return lambda **settings: tiny("FluxPipeline", **settings)


@pytest.fixture
def fault_pipeline_of(fault_family, tmp_path):
    """Return a function that loads a model that fails on demand, with settings."""

    def load(**settings):
        index = {"_class_name": "FaultPipeline", "_diffusers_version": "0.42.1"}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return load_pipeline(ServerArgs(str(tmp_path), device="cpu", **settings))

    return load
