"""What stages take is counted at a few sizes, and is what they take at others."""

from __future__ import annotations

import pytest

from safelight import ServerArgs
from safelight.acceleration.activations import LiveStorages
from safelight.core.executor import Execution
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import SHIPPED_MODEL
from safelight.loading.stage_memory import fit
from safelight.testing.models import requests
from tests.recipes import all_recipes


def test_a_plane_goes_through_what_was_counted():
    def taken(pixels, tokens):
        return 1000 + 3 * pixels + 500 * tokens

    sizes = [(65536, 256), (262144, 1024), (65536, 512)]
    (fitted,) = fit([(size, {"decoding": taken(*size)}) for size in sizes])
    for size in ((1024, 4), (2**22, 2**14), (2**18, 2**15)):
        assert fitted.of(*size) == pytest.approx(taken(*size), rel=1e-6)
    (constant,) = fit([(size, {"text_encoding": 7 << 20}) for size in sizes])
    assert constant.of(2**24, 2**16) == pytest.approx(7 << 20, rel=1e-6)


def peaks(pipeline, req):
    """Return the most bytes that were alive in each stage of a request that was really run."""
    most: dict[str, int] = {}
    with Execution(pipeline, req) as execution, LiveStorages() as live:
        more = True
        while more:
            stage, live.peak = req.stage, 0
            more = execution.advance()
            most[stage] = max(most.get(stage, 0), live.peak)
    return most


def hold_to_what_is_taken(pipeline, fields):
    memory = {stage.stage: stage for stage in pipeline.components.count_memory()}
    compared = 0
    for asked in fields:
        (req, *_) = requests(pipeline, asked)
        size = (req.params.num_pixels(pipeline.schema), req.params.num_sequence_tokens(pipeline.schema))
        largest = max(stage.of(*size) for stage in memory.values())
        for stage, taken in peaks(pipeline, req).items():
            assert stage in memory or taken < largest, "what no component does is less than what one does"
            if stage in memory and taken > 4 << 20:  # a text is counted at its full length
                assert 0.8 * taken < memory[stage].of(*size) < 1.5 * taken, (asked, stage, taken)
                compared += 1
    assert compared >= len(fields)


SIZES = ({"height": 320, "width": 448}, {"height": 384, "width": 192})


def test_what_is_counted_is_what_the_shipped_model_takes():
    pipeline = load_pipeline(ServerArgs(str(SHIPPED_MODEL), device="cpu"))
    hold_to_what_is_taken(pipeline, [{"num_inference_steps": 1, "prompt": "a", **size} for size in SIZES])


FAMILIES = ["FluxPipeline", "FluxKontextPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "WanPipeline"]
FAMILIES += ["WanImageToVideoPipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline_name", FAMILIES)
def test_what_is_counted_is_what_tiny_models_take(tmp_path, pipeline_name):
    recipe = all_recipes()[pipeline_name]
    recipe.build(tmp_path, "default")
    pipeline = load_pipeline(ServerArgs(str(tmp_path), device="cpu", kernels="plain"))
    case = next(case for case in recipe.cases if case.variant == "default")
    fields = [{**case.fields, **size, "max_area": size["height"] * size["width"]} for size in SIZES]
    known = pipeline.schema.params_cls.options()
    hold_to_what_is_taken(pipeline, [{name: entry[name] for name in entry if name in known} for entry in fields])
