"""Compiled blocks of the package's pipelines: near the eager form, the same bytes each time, by its own tables."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.models.transformers import transformer_ltx
from torch._dynamo.utils import counters

from safelight import ServerArgs
from safelight.acceleration import compile as compile_module
from safelight.acceleration.blocks import blocks_by_class
from safelight.acceleration.compilation import Compilation
from safelight.errors import CompilationError, InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.runtime.worker.background import BackgroundCompiler
from safelight.runtime.worker.model_runner import PipelineRunner
from tests.acceleration import packages
from tests.acceleration.compiled import SECONDS, alone, wait
from tests.acceleration.memories import LateMemory
from tests.backends.conftest import WITHOUT_TEXT

NEAR = 1e-5
"""Of pixels in [0, 1], as for the families."""
CLASSES = {
    "StableDiffusionXLPipeline": {"unet": {"BasicTransformerBlock": 4}},
    "StableDiffusion3Pipeline": {"transformer": {"JointTransformerBlock": 4}},
    "LTXPipeline": {"transformer": {"LTXVideoTransformerBlock": 4}},
    "HunyuanVideoPipeline": {
        "transformer": {
            "HunyuanVideoPatchEmbed": 1,
            "HunyuanVideoTokenRefiner": 1,
            "HunyuanVideoTransformerBlock": 3,
            "HunyuanVideoSingleTransformerBlock": 3,
        }
    },
    "WanPipeline": {"transformer": {"WanTransformerBlock": 4}, "transformer_2": {"WanTransformerBlock": 4}},
}


QUICK = ("StableDiffusion3Pipeline", "LTXPipeline")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function that loads a tiny pipeline through the package."""
    built = functools.cache(lambda name: packages.build(name, tmp_path_factory.mktemp(name)))

    def loaded(name, memory=None, **settings):
        args = ServerArgs(str(built(name)), device="cpu", dtype="float32", backend="diffusers", **settings)
        return load_pipeline(args, memory)

    return loaded


def asked(name):
    return [{**packages.FIELDS[name], **packages.COMMON, "seed": seed, "height": 32 * seed} for seed in (1, 2)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)
def test_blocks_are_of_the_classes_that_the_package_names(load, name):
    """SD3's class has no table of repeated blocks: those that are not to be divided, in lists, are its blocks."""
    networks = load(name).denoisers()
    found = {
        component: {kind: len(blocks) for kind, blocks in blocks_by_class(module).items()}
        for component, module in networks.items()
    }
    assert found == CLASSES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_another_process_fills_the_cache_and_every_class_is_near(load, name, tmp_path, monkeypatch):
    """This process only finds what the other compiled; no request compiles; each gives its bytes again."""
    monkeypatch.setenv(compile_module.CACHE_VARIABLE, str(tmp_path))
    pipeline = load(name, compile="blocks")
    compilation = Compilation(pipeline)
    assert {key: {each.name for each in classes} for key, classes in compilation._classes.items()} == {
        key: set(kinds) for key, kinds in CLASSES[name].items()
    }
    assert wait(BackgroundCompiler(compilation, SECONDS)) == ""
    counters.clear()
    compilation.finish()
    assert counters["inductor"]["fxgraph_cache_hit"] >= 1 and counters["inductor"]["fxgraph_cache_miss"] == 0
    num_graphs = counters["stats"]["unique_graphs"]
    for fields in asked(name):
        expected, made = alone(pipeline, fields), alone(pipeline, fields, compilation)
        assert (made - expected).abs().max() < NEAR and not torch.equal(made, expected)
        assert torch.equal(made, alone(pipeline, fields, compilation))
    assert counters["stats"]["unique_graphs"] == num_graphs


@pytest.mark.slow
def test_compiled_blocks_stream_too(load):
    """Offload moves the weights below the compiled form; a request's own copy of a network runs eagerly."""
    name = "LTXPipeline"
    resident, streamed = (
        load(name, compile="blocks"),
        load(name, LateMemory(), compile="blocks", offload="blocks", memory_limit="64GiB"),
    )
    compilations = [Compilation(pipeline) for pipeline in (resident, streamed)]
    (fields, _) = asked(name)
    for compilation in compilations:
        compilation.finish()
    first, second = (alone(each.pipeline, fields, each) for each in compilations)
    assert torch.equal(first, second)
    assert not torch.equal(first, alone(resident, fields))
    assert streamed.residency.num_swaps >= 3


def test_a_class_without_blocks_is_refused(tmp_path):
    import diffusers

    diffusers.DDPMPipeline(**WITHOUT_TEXT["DDPMPipeline"](tmp_path)).save_pretrained(tmp_path)
    pipeline = load_pipeline(ServerArgs(str(tmp_path), device="cpu", compile="blocks"))
    words = "compile: got 'blocks'; it takes none for this model: DDPMPipeline has no network whose class names its"
    with pytest.raises(InvalidParameterError, match=words):
        PipelineRunner(pipeline)


def test_graphs_are_refused(load):
    with pytest.raises(InvalidParameterError, match="cuda_graphs: got 'steps'; it takes none with LTXPipeline"):
        PipelineRunner(load("LTXPipeline", cuda_graphs="steps"))


@pytest.mark.slow
def test_what_torch_cannot_trace_fails_by_name(load, monkeypatch):
    forward = transformer_ltx.LTXVideoTransformerBlock.forward

    def breaks(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformer_ltx.LTXVideoTransformerBlock, "forward", breaks)
    pipeline = load("LTXPipeline")
    compilation = Compilation(pipeline)
    with pytest.raises(CompilationError, match="the model cannot be compiled"):
        compilation.finish()
    assert compilation.state == "failed" and alone(pipeline, asked("LTXPipeline")[0]).isfinite().all()
