"""What is decided before a model is loaded, and what excludes what."""

from __future__ import annotations

import dataclasses

import pytest

from safelight import ServerArgs
from safelight.acceleration.plan import (
    WORKSPACE,
)
from safelight.errors import InvalidParameterError
from safelight.loading.planning import device_memory, layout_for, plan_memory, refuse_excluded
from safelight.loading.repository import open_repository
from tests.recipes import all_recipes

GIB = 2**30


def test_what_a_cache_keeps_on_the_device_is_not_planned_with(tmp_path):
    """Where nothing waits on the host the conditioning cache is on the device too."""
    folder = tmp_path / "model"
    all_recipes()["FluxPipeline"].build(folder, "default")
    repository, kept = open_repository(folder), 300 * 2**20
    args = ServerArgs(str(folder), dtype="float32", conditioning_cache="300MiB")
    roomy = plan_memory(repository, args, 8 * GIB)
    assert roomy.footprint.kept == kept and roomy.fits
    least = roomy.peak + WORKSPACE + kept
    assert plan_memory(repository, args, least).fits
    with pytest.raises(InvalidParameterError, match="memory_limit"):
        plan_memory(repository, args, least - 1)
    on_host = dataclasses.replace(args, offload="components")
    assert plan_memory(repository, on_host, least - 1).footprint.kept == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"tp_size": 2, "offload": "blocks"},
            "offload: got 'blocks'; it takes none with 2 devices for a request: what",
        ),
        ({"tp_size": 2, "compile": "blocks"}, "compile: .* ranks would have the compiled form at different times"),
        ({"ulysses_degree": 4, "cuda_graphs": "steps"}, "cuda_graphs: .* none with 4 devices"),
        ({"tp_size": 2, "vae_tiling": "exact"}, "vae_tiling: .* vae_parallel decodes in bands, one a rank"),
        ({"vae_parallel": True}, "vae_parallel: got True; it takes false with one device"),
        ({"offload": "auto", "cuda_graphs": "steps"}, "cuda_graphs: .* none with offload=auto: a graph holds"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_reason(settings, words):
    with pytest.raises(InvalidParameterError, match=words):
        refuse_excluded(ServerArgs("model", **settings))


def test_what_does_not_exclude_each_other_is_taken():
    refuse_excluded(ServerArgs("model", tp_size=2, vae_parallel=True))
    refuse_excluded(ServerArgs("model", offload="auto", compile="blocks", vae_tiling="exact"))


def test_devices_share_what_the_model_can_be_divided_by(tmp_path):
    folder = tmp_path / "model"
    all_recipes()["FluxPipeline"].build(folder, "default")
    asked = ServerArgs(str(folder), device="cpu", tp_size=3)
    assert layout_for(asked).layout.num_devices == 3
    with pytest.raises(InvalidParameterError, match="tp_size"):
        layout_for(dataclasses.replace(asked, tp_size=7))
    with pytest.raises(InvalidParameterError, match="1 for a model run by the diffusers package"):
        layout_for(dataclasses.replace(asked, backend="diffusers"))


def test_a_processor_has_no_memory_of_its_own():
    assert device_memory(ServerArgs("model", device="cpu")) is None
    with pytest.raises(InvalidParameterError, match="offload: got 'auto'; it takes none on cpu"):
        device_memory(ServerArgs("model", device="cpu", offload="auto"))
