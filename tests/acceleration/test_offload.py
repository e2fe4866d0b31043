"""Offload: bytes do not change, no more lies on the device than planned, and faults leave it consistent."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from safelight import ServerArgs
from safelight.acceleration.memory import BUFFER_BYTES, NUM_BUFFERS
from safelight.acceleration.offload import BlockStream, Packed, Stager, StreamedModule, WholeModule, spread, tensors_of
from safelight.acceleration.plan import WORKSPACE, make_plan, plan_mode
from safelight.core.executor import Execution
from safelight.errors import InvalidParameterError
from safelight.loading.footprint import measure
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.runtime.worker.engine import Engine
from safelight.testing.models import TinyModels, requests
from safelight.testing.recipes import shake
from tests.acceleration.memories import UNLIMITED, CountingMemory, FailingMemory, HostMemory, LateMemory
from tests.recipes import all_recipes

NUM_LAYERS = 5
CHOSEN = [
    ("FluxPipeline", "default"),
    pytest.param(("WanPipeline", "2.2"), marks=pytest.mark.slow),
    pytest.param(("QwenImagePipeline", "default"), marks=pytest.mark.slow),
    pytest.param(("WanImageToVideoPipeline", "default"), marks=pytest.mark.slow),
]
"""A pipeline of each family, with two transformers or an image encoder among them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("checkpoints"))


def deepen(folder):
    """Give transformers of two blocks five, so that blocks stream."""
    for name in ("transformer", "transformer_2"):
        path = folder / name / "config.json"
        if path.is_file() and json.loads(path.read_text())["num_layers"] < NUM_LAYERS:
            config = json.loads(path.read_text())
            torch.manual_seed(0)
            cls = getattr(diffusers, config["_class_name"])
            deeper = cls.from_config({**config, "num_layers": NUM_LAYERS})
            shake(deeper, 6)
            deeper.save_pretrained(folder / name)


def fields_of(recipe, variant):
    """Return what is asked of a pipeline: two requests of other sizes and texts."""
    fit = [case.fields for case in recipe.cases if case.variant == variant and isinstance(case.fields["prompt"], str)]
    return [{**fields, "n": 1, "num_inference_steps": 3} for fields in fit[:2]]


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda item: item[0])
def model(request, models):
    """Return a checkpoint's folder, what is asked of it, and the bytes without offload."""
    recipe, variant = all_recipes()[request.param[0]], request.param[1]
    folder = models.folder(recipe, variant)
    deepen(folder)
    asked = fields_of(recipe, variant)
    sizes = {name: asked[0][name] for name in ("height", "width", "num_frames") if name in asked[0]}
    (folder / "generation_config.json").write_text(json.dumps(sizes))  # the default that is planned for
    plain = load_pipeline(ServerArgs(str(folder), device="cpu"))
    return folder, asked, [alone(plain, fields) for fields in asked]


def alone(pipeline, fields):
    (req,) = requests(pipeline, fields)
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@functools.cache
def footprint_of(folder):
    """Return what the model's default request needs."""
    return measure(open_repository(folder), ServerArgs(str(folder), dtype="float32"), {})


def least_limit(folder, mode):
    """Return the smallest limit under which a mode fits the model's default request."""
    return plan_mode(footprint_of(folder), 0, mode, False).peak + WORKSPACE


def load(folder, mode, limit, memory, **settings):
    args = ServerArgs(str(folder), device="cpu", dtype="float32", offload=mode, memory_limit=limit, **settings)
    return load_pipeline(args, memory)


@pytest.mark.parametrize("mode", ["alternates", "components", "blocks"])
def test_bytes_do_not_change(model, mode):
    """Alone and interleaved, with copies that come as late as they may, and never more on the device than planned."""
    folder, asked, expected = model
    if mode == "alternates" and not (folder / "transformer_2").is_dir():
        with pytest.raises(InvalidParameterError, match="offload: got 'alternates'"):
            load(folder, mode, "8GiB", HostMemory())
        return
    limit, memory = least_limit(folder, mode), LateMemory()
    pipeline = load(folder, mode, limit, memory)
    plan = make_plan(footprint_of(folder), limit, mode)
    assert same(alone(pipeline, asked[0]), expected[0])
    executions = [Execution(pipeline, requests(pipeline, fields)[0]) for fields in asked]
    running = list(executions)
    while running:
        running = [execution for execution in running if execution.advance()]
    for execution, outputs in zip(executions, expected, strict=True):
        assert same(execution.req.outputs, outputs)
    assert pipeline.residency.num_swaps > len(plan.placed)  # they left, and came again
    fixed = sum(size.num_bytes for name, size in plan.footprint.components.items() if name not in plan.placed)
    assert 0 < memory.peak <= max(stage.weights for stage in plan.stages) - fixed
    assert memory.pinned == plan.pinned
    if mode == "blocks":
        assert memory.num_copies > 20
    pipeline.residency.clear()
    assert memory.live == 0


def test_weights_that_wait_are_the_mapped_files(model):
    """Nothing of a component that comes and goes has a private copy on the host, but for what a VAE rearranges."""
    folder, _, _ = model
    pipeline = load(folder, "components", least_limit(folder, "components"), HostMemory())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, module in pipeline.modules().items():
        private = sum(
            parameter.nbytes
            for parameter in module.parameters()
            if not any(start <= parameter.data_ptr() < end for start, end in ranges)
        )
        whole = sum(parameter.nbytes for parameter in module.parameters())
        rearranged = sum(
            part.weight.nbytes for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d) and name == "vae"
        )
        assert private <= rearranged < whole or private == 0, name


@pytest.mark.parametrize("mode", ["components", "blocks"])
def test_no_room_and_failing_copies_leave_it_consistent(model, mode):
    """Whatever fails when a component, or a block, is brought, to the last one: the next request is right."""
    folder, asked, expected = model
    memory = FailingMemory()
    pipeline = load(folder, mode, least_limit(folder, mode), memory, conditioning_cache="0")
    pipeline.residency.clear()
    alone(pipeline, asked[0])
    needed = UNLIMITED - (memory.allocations_left if mode == "components" else memory.copies_left)
    last = needed - 1 if mode == "components" else needed // 2  # the last copies of blocks are for the next call
    for left in sorted({0, 1, needed // 2, last}):
        pipeline.residency.clear()
        memory.allocations_left = memory.copies_left = UNLIMITED
        memory.allocations_left, memory.copies_left = (left, UNLIMITED) if mode == "components" else (UNLIMITED, left)
        with pytest.raises((torch.OutOfMemoryError, RuntimeError), match=r"no room|the copy failed"):
            alone(pipeline, asked[0])
        memory.allocations_left = memory.copies_left = UNLIMITED
        assert same(alone(pipeline, asked[1]), expected[1])


def test_cancelling_leaves_it_consistent(model):
    folder, asked, expected = model
    pipeline = load(folder, "blocks", least_limit(folder, "blocks"), LateMemory())
    for num_units in (3, 7, 10):
        (req,) = requests(pipeline, asked[0])
        with Execution(pipeline, req) as execution:
            for _ in range(num_units):
                execution.advance()
    assert same(alone(pipeline, asked[1]), expected[1])


def test_a_block_that_fails_leaves_the_others_right(model):
    """An exception in the middle of a forward, at each block in turn."""
    folder, asked, expected = model
    pipeline = load(folder, "blocks", least_limit(folder, "blocks"), LateMemory())
    transformer = pipeline.get_module("transformer")
    names = type(transformer)._repeated_blocks
    blocks = [block for block in transformer.modules() if type(block).__name__ in names]
    for block in blocks:

        def fail(*_):
            raise ZeroDivisionError

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            alone(pipeline, asked[0])
        hook.remove()
    assert same(alone(pipeline, asked[0]), expected[0])


def test_the_engine_prefers_what_is_on_the_device(model):
    """Of two equal requests one runs through its steps: components do not come and go at each of them."""
    folder, asked, expected = model
    pipeline = load(folder, "components", least_limit(folder, "components"), HostMemory())
    engine = Engine(pipeline, clock=lambda: 0.0)
    tasks = [engine.add(requests(pipeline, asked[0])[0]) for _ in range(2)]
    while any(not task.done for task in tasks):
        engine.tick()
    assert all(task.error is None and same(task.execution.req.outputs, expected[0]) for task in tasks)
    alone_swaps = len(pipeline.modules()) + 1
    assert pipeline.residency.num_swaps <= 2 * alone_swaps


class CountingStager(Stager):
    """Counts the blocks that it is given to copy."""

    num_begun = 0

    def begin(self, packed, target, after):
        self.num_begun += 1
        return super().begin(packed, target, after)


class Blocks(nn.Module):
    """Blocks in a row, each with a matrix, a tied parameter, a buffer, and memory whose channels lie last."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList()
        for _ in range(count):
            convolution, norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            assert norm.running_mean is not None
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
            norm.register_buffer("running_mean", torch.randn(8))
            self.blocks.append(nn.Sequential(convolution, norm))
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(self.first(x.movedim(1, -1)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_resident", [0, 1, 3])
def test_blocks_stream(count, num_resident):
    """Bytes, counts and sizes, for every number of blocks; tied weights are copied once, strides stay."""
    if num_resident >= count:
        return
    module, memory = Blocks(count).eval().requires_grad_(False), LateMemory()
    x = torch.randn(1, 8, 5, 6)
    expected = module(x)
    blocks = list(module.blocks)
    sizes = [Packed(tensors_of(block)).num_bytes for block in blocks]
    stager = CountingStager(memory, max(sizes))
    stream = BlockStream(blocks, num_resident, stager, memory)
    placed = StreamedModule(module, stream, memory)
    host = [tensor.data_ptr() for tensor in tensors_of(module)]
    placed.enter()
    streamed = count - num_resident
    for calls in range(1, 4):
        with torch.inference_mode():
            assert torch.equal(module(x), expected)
        # One ahead of the last, unless all of them stay in the slots.
        assert stager.num_begun == (calls * streamed + 1 if streamed > 2 else streamed)
    assert memory.live == memory.peak == placed.num_bytes
    assert memory.pinned == 2 * max(sizes) + NUM_BUFFERS * BUFFER_BYTES
    placed.leave()
    assert memory.live == 0
    assert [tensor.data_ptr() for tensor in tensors_of(module)] == host
    assert not any(tensor.is_inference() for tensor in tensors_of(module))
    assert torch.equal(module(x), expected)


def test_blocks_that_are_called_out_of_order_are_copied_then():
    module, memory = Blocks(6).eval().requires_grad_(False), LateMemory()
    x = torch.randn(1, 8, 4, 4)
    order = [3, 0, 0, 5, 1, 2]
    with torch.no_grad():
        expected = x
        for index in order:
            expected = module.blocks[index](expected)
        stream = BlockStream(list(module.blocks), 0, Stager(memory, 1 << 16), memory)
        placed = StreamedModule(module, stream, memory)
        placed.enter()
        for _ in range(3):
            made = x
            for index in order:
                made = module.blocks[index](made)
            assert torch.equal(made, expected)


def test_a_pinned_buffer_is_not_used_again_before_its_copy_is_done():
    """Five copies are begun, and none is waited for until then."""
    memory, blocks = LateMemory(), Blocks(5).blocks
    packed = [Packed(tensors_of(block)) for block in blocks]
    stager = Stager(memory, packed[0].num_bytes)
    targets = [memory.allocate(each.num_bytes) for each in packed]
    begun = [stager.begin(each, target, memory.mark()) for each, target in zip(packed, targets, strict=True)]
    memory.synchronize(begun[-1].result(10))
    for each, target, block in zip(packed, targets, blocks, strict=True):
        for view, tensor in zip(each.views(target), tensors_of(block), strict=True):
            assert torch.equal(view, tensor)


def test_a_copy_that_failed_is_made_again():
    module, memory = Blocks(5).eval().requires_grad_(False), FailingMemory()
    x = torch.randn(1, 8, 4, 4)
    expected = module(x)
    placed = StreamedModule(module, BlockStream(list(module.blocks), 0, Stager(memory, 1 << 16), memory), memory)
    for left in range(4):
        placed.enter()
        memory.copies_left = left
        with pytest.raises(RuntimeError, match="the copy failed"):
            module(x)
        memory.copies_left = UNLIMITED
        assert torch.equal(module(x), expected)
        placed.leave()


def test_a_module_comes_whole():
    module, memory = Blocks(2).eval().requires_grad_(False), CountingMemory()
    x = torch.randn(1, 8, 3, 3)
    expected = module(x)
    placed = WholeModule(Packed(tensors_of(module)), memory)
    with torch.inference_mode():
        placed.enter()
        assert torch.equal(module(x), expected)
        assert module.get_parameter("blocks.0.0.weight").is_contiguous(memory_format=torch.channels_last)
        placed.leave()
    assert memory.live == 0


@pytest.mark.parametrize(("count", "total"), [(0, 5), (1, 5), (3, 7), (5, 5), (19, 57)])
def test_resident_blocks_are_spread(count, total):
    chosen = sorted(spread(count, total))
    assert len(chosen) == count
    gaps = [after - before for before, after in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
