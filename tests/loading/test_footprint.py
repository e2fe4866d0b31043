"""What a model needs, counted without its weights, against what is alive as it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safelight import ServerArgs
from safelight.acceleration.activations import LiveStorages
from safelight.acceleration.offload import offload, tensors_of
from safelight.acceleration.plan import (
    WORKSPACE,
    make_plan,
)
from safelight.loading.footprint import Peaks, empty_pipeline, measure, rehearse, request
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.testing.models import TinyModels
from tests.acceleration.memories import HostMemory
from tests.recipes import all_recipes

GIB = 2**30
SOLVER_TABLES = 2**16
"""Bytes of the solver's tables, which lie on the host and are counted all the same."""
PUBLISHED = Path(__file__).parent / "published"


class MetaMemory(HostMemory):
    """A device whose buffers have no memory: what is alive of them can be counted."""

    def allocate(self, num_bytes):
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    pin = allocate


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return what opens a repository that has the published JSON of a model, and nothing else."""

    def opened(name):
        folder = tmp_path_factory.mktemp(name)
        for path, content in json.loads((PUBLISHED / f"{name}.json").read_text()).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(content))
        return open_repository(folder, weights=False)

    return opened


def counted_peaks(repository, plan, fields):
    """Run two requests by a plan with every tensor on the meta device; return the bytes alive in each stage."""
    pipeline = empty_pipeline(repository, ServerArgs())
    modules = pipeline.modules()
    resident = [name for name in modules if name not in plan.placed]
    fixed = sum(tensor.nbytes for name in resident for tensor in tensors_of(modules[name]))
    placed = {name: modules[name] for name in plan.placed}
    residency = offload(placed, plan.rooms, plan.resident_blocks, MetaMemory())
    forward = pipeline.forward

    def brought(call):
        residency.bring([call.component])
        return forward(call)

    with LiveStorages() as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "forward", brought)
        peaks = Peaks(live)
        for _ in range(2):
            rehearse(pipeline, request(pipeline.schema, fields), peaks)
    return {unit: peak + fixed for unit, peak in peaks.most.items()}


@pytest.mark.parametrize(
    ("name", "limit", "fields", "mode"),
    [
        pytest.param("flux_1_dev", 24, {}, "components", marks=pytest.mark.slow),
        pytest.param("flux_1_dev", 16, {"height": 768, "width": 1360}, "blocks", marks=pytest.mark.slow),
        pytest.param("wan_2_2_t2v_a14b", 24, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("wan_2_2_t2v_a14b", 60, {"height": 720, "width": 1280}, "alternates", marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_real_shapes_is_what_is_counted(published, name, limit, fields, mode):
    """Never less than counted in any stage, and within 5% of it where it is most."""
    repository = published(name)
    plan = make_plan(measure(repository, ServerArgs(), fields), limit * GIB)
    assert plan.offload == mode
    assert plan.peak + WORKSPACE <= limit * GIB
    counted = counted_peaks(repository, plan, fields)
    for before, planned in zip((plan.stages[-1], *plan.stages), plan.stages, strict=False):
        seen = counted[planned.footprint.stage, planned.footprint.component]
        print(f"{name} {planned.footprint.stage} {planned.footprint.component}: planned {planned.peak}, counted {seen}")
        # Until a stage's component comes, the one of the stage before may still be there.
        assert seen <= max(before.peak, planned.peak) + SOLVER_TABLES
    assert max(counted.values()) <= plan.peak <= 1.05 * max(counted.values())


SIZES = {
    # Parameters of the published files, by their own indices.
    "flux_1_dev": {"text_encoder_2": 4_762_310_656, "transformer": 11_901_408_320, "vae": 83_819_683},
    "wan_2_2_t2v_a14b": {"text_encoder": 5_680_910_336, "transformer": 14_288_491_584, "vae": 126_892_531},
}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_their_published_sizes(published, name):
    pipeline = empty_pipeline(published(name), ServerArgs())
    for component, size in SIZES[name].items():
        assert sum(parameter.numel() for parameter in pipeline.get_module(component).parameters()) == size


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImageEditPipeline", "WanImageToVideoPipeline"])
def test_planned_components_have_the_tensors_that_are_loaded(models, name, dtype):
    """Names, shapes and dtypes, those that stay in float32 among them."""
    args = ServerArgs(str(models.folder(all_recipes()[name])), device="cpu", dtype=dtype)
    planned, loaded = empty_pipeline(open_repository(args.model), args).modules(), load_pipeline(args).modules()
    assert planned.keys() == loaded.keys()
    for component, module in loaded.items():
        expected = {key: (tensor.shape, tensor.dtype) for key, tensor in module.named_parameters()}
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in planned[component].named_parameters()} == expected
        assert {tensor.device.type for tensor in tensors_of(planned[component])} == {"meta"}
