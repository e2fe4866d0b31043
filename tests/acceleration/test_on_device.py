"""Techniques on the device: fused operations and attention at real sizes, graphs, compiled blocks, offload, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.common import as_tensor
from benchmarks.stacks import STACKS
from safelight import ServerArgs
from safelight.acceleration.compilation import canonical_request, first_calls
from safelight.acceleration.fused.fusion import fuse
from safelight.acceleration.graphs import CudaRecorder, StepGraphs
from safelight.acceleration.plan import WORKSPACE, plan_mode
from safelight.attention import BACKENDS
from safelight.attention.backends import AttentionKind, compute_capability, disagreement
from safelight.attention.check import formula, largest_error
from safelight.core.calls import ModelCall
from safelight.core.executor import SyncExecutor
from safelight.core.form import Form
from safelight.loading.footprint import measure
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.runtime.worker.model_runner import PipelineRunner
from safelight.testing.models import requests
from tests.acceleration.memories import LateMemory
from tests.calls import through
from tests.features import runs
from tests.recipes import all_recipes

pytestmark = pytest.mark.cuda
only_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="is CUDA's alone")


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_every_operation_is_fused_at_full_width(stack, dtype, device):
    """One block of each kind, at the published width."""
    architecture = replace(stack.full.architecture, **{kind.field: 1 for kind in stack.blocks})
    transformer = stack.random_transformer(architecture, dtype, str(device))
    report = fuse(transformer, device, dtype)
    assert report.num_fused and not report.num_plain, str(report)


SHAPES = [(24, 4608, 4608, 128), (24, 4608 + 77, 4608 + 77, 128), (12, 32760, 512, 128), (12, 4000, 4000, 128)]
"""Heads, queries, keys and channels of FLUX, of a text of another length, and of Wan's two kinds."""


def kinds_of(device):
    for name, backend in BACKENDS.items():
        if backend.load is None:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                kind = AttentionKind(device.type, dtype, False, 128, compute_capability(device.type))
                if backend.refusal(kind) is None:
                    yield name, backend, kind


def test_attention_at_real_sizes_is_the_formula(device):
    """Every backend that the check takes, against float64, on some of the heads."""
    taken = 0
    for name, backend, kind in kinds_of(device):
        assert disagreement(backend, kind) is None or name != "sdpa"
        if disagreement(backend, kind) is not None or name == "math":
            continue
        for num_heads, num_queries, num_keys, head_size in SHAPES[: None if device.type == "cuda" else 0]:
            heads = min(num_heads, 2)  # the formula's scores are float64
            generator = torch.Generator(device).manual_seed(num_queries)
            query, key, value = (
                torch.randn(1, num_tokens, heads, head_size, generator=generator, device=device)
                .to(kind.dtype)
                .transpose(1, 2)
                for num_tokens in (num_queries, num_keys, num_keys)
            )
            with torch.inference_mode():
                exact = torch.cat([formula(part, key, value, None) for part in query.split(2048, dim=2)], dim=2)
                made = backend(query, key, value, None, False, None).double()
            error = float((made - exact).norm() / exact.norm())
            assert error <= 2 * largest_error(kind.dtype, False), f"{name}, {kind}: {error:.1e}"
        taken += 1
    assert taken


def first_call(pipeline):
    return first_calls(pipeline, canonical_request(pipeline), pipeline.denoisers())[0]


def scaled(asked, scale):
    kwargs = {**asked.kwargs, "hidden_states": asked.kwargs["hidden_states"] * scale}
    return ModelCall(asked.component, kwargs, asked.shared_kwargs, asked.signature, asked.key)


@only_cuda
def test_what_cannot_be_captured_stays_eager(tiny_flux, device, caplog):
    """It asks the device for a value. The stream is what it was, and the next shape is captured."""
    pipeline = tiny_flux(device="cuda", dtype="bfloat16", cuda_graphs="steps")
    asked, stream = first_call(pipeline), torch.cuda.current_stream()

    class Always(CudaRecorder):
        def measure(self, run):
            return run(), True

    def asking(each):
        made = as_tensor(pipeline.forward(each))
        return made * (1.0 if made.sum().item() > -1e9 else 2.0)

    graphs = StepGraphs(pipeline.device, Always(pipeline.device))
    make, plain = through(graphs, asking), through(graphs, pipeline.forward, Form("compiled"))
    with torch.inference_mode():
        for scale in (1.0, 0.5, -2.0, 0.25, 3.0):
            each = scaled(asked, scale)
            assert torch.equal(as_tensor(make(each)), as_tensor(pipeline.forward(each)))
            assert torch.cuda.current_stream() == stream
        assert graphs.num_graphs == 0 and "stay without a graph" in caplog.text
        for scale in (1.0, 0.5, -2.0, 0.25):
            each = scaled(asked, scale)
            assert torch.equal(as_tensor(plain(each)), as_tensor(pipeline.forward(each)))
        assert graphs.num_graphs == 1 and graphs.num_bytes > 0


def pictures(pipeline, name):
    runner = PipelineRunner(pipeline)
    runner.finish_compiling()
    reqs = runs.asked(pipeline, name)
    for req in reqs:
        for _ in SyncExecutor(pipeline, runner, runner.form).execute(req):
            pass
    return [req.outputs[0] for req in reqs]


@pytest.fixture(params=list(runs.ASKED))
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return runs.build(name, tmp_path / "model")


@pytest.mark.parametrize("mode", ["components", "blocks"])
def test_offload_changes_no_byte(name, folder, device, mode):
    off: dict[str, Any] = {"kernels": "plain", "conditioning_cache": "0", "dtype": "float32", "device": str(device)}
    wanted = pictures(load_pipeline(ServerArgs(str(folder), **off)), name)
    footprint = measure(open_repository(folder), ServerArgs(str(folder), dtype="float32"), {})
    limit = plan_mode(footprint, 0, mode, False).peak + WORKSPACE
    memory = None
    if device.type == "cpu":
        memory = LateMemory()
    limited = load_pipeline(ServerArgs(str(folder), offload=mode, memory_limit=limit, **off), memory)
    made = pictures(limited, name)
    assert limited.residency.num_swaps > 0
    assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))


def test_compiled_blocks_are_near(name, folder, device):
    off: dict[str, Any] = {"conditioning_cache": "0", "dtype": "float32", "device": str(device)}
    wanted = pictures(load_pipeline(ServerArgs(str(folder), **off)), name)
    made = pictures(load_pipeline(ServerArgs(str(folder), compile="blocks", **off)), name)
    for one, other in zip(made, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-4


@only_cuda
def test_what_is_allocated_is_what_was_planned(name, folder, device):
    """Within the workspace that the plan leaves, and not less than nine tenths of what is planned."""
    args = ServerArgs(str(folder), device="cuda", dtype="float32", conditioning_cache="0", kernels="plain")
    size = {key: max(fields[key] for fields in runs.ASKED[name]) * 4 for key in ("height", "width")}
    footprint = measure(open_repository(folder), args, {**size, "prompt": "a cat"})
    planned = plan_mode(footprint, 2**40, "none", False).peak
    pipeline = load_pipeline(args)
    fields = {key: value for key, value in runs.ASKED[name][1].items() if key not in size}
    (req,) = requests(pipeline, {**runs.COMMON, **fields, **size})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in SyncExecutor(pipeline).execute(req):
        pass
    allocated = torch.cuda.max_memory_allocated()
    print(f"{name}: planned {planned:,}, allocated {allocated:,}")
    assert allocated <= planned * 1.1 + 2**26, f"planned {planned:,}, allocated {allocated:,}"


def test_every_recipe_has_a_place_here():
    assert set(runs.ASKED) <= set(all_recipes())
