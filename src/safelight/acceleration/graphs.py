"""CUDA graphs of model calls that are bound by launches: captured once a shape, then replayed as one launch.

A call of a small picture is hundreds of kernels that each take less than their launch does, so that the device waits
for the host. A graph replays the same kernels on the same addresses: the bytes are equal. So nothing of this is a mode,
and whether a shape has a graph may depend on a measurement.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.core.calls import ModelCall
from safelight.core.device import is_lost, numbered, on_device
from safelight.core.model_runner import Forward, Make
from safelight.core.pipeline import ComposedPipeline
from safelight.core.trees import Tree, leaves, map_tree
from safelight.errors import InvalidParameterError, in_one_line

logger = logging.getLogger(__name__)

MAX_GRAPHS = 16
"""Graphs that are kept; the one that was not used for longest goes first."""
MAX_SHAPES = 1024
"""Shapes of which it is remembered whether they are bound by launches."""
BOUND_BY_LAUNCHES = 0.75
"""Share of a call's time that the host needs to launch it, from which it is bound by launches."""
NUM_WARM_UPS = 2
"""Calls before a capture, in which libraries choose algorithms and allocate workspaces."""


class CaptureError(Exception):
    """A function cannot be recorded: it asks the device for a value, say, or there is too little memory."""


class Recorder(Protocol):
    """Records what a function does on a device, and can do it again. The seam to CUDA."""

    def measure(self, run: Callable[[], Tree]) -> tuple[Tree, bool]:
        """Run a function that has run before; return its result, and whether the device waited for the host."""

    def record(self, run: Callable[[], Tree]) -> tuple[Callable[[], None], Tree]:
        """Record a function; return what does the same again, and the tensors that it writes its result to.

        Raises:
            CaptureError: if it cannot be recorded; the device is as it was.

        """

    def num_bytes(self) -> int:
        """Return the memory that all recordings hold for their intermediate results."""


class CudaRecorder(Recorder):
    """Records CUDA graphs, which share one memory pool: they run one after another, and results are copied at once.

    Args:
        device: of CUDA.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = numbered(device)
        self._pools: list[Any] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Take a pool and a stream of its own: a capture that fails leaves those that it had unfit for another."""
        self._pools.append(torch.cuda.graph_pool_handle())
        # One stream for all: cuBLAS keeps a workspace for each that it has worked on.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def measure(self, run: Callable[[], Tree]) -> tuple[Tree, bool]:
        torch.cuda.synchronize(self._device)
        begun = time.perf_counter()
        result = run()
        launched = time.perf_counter()
        torch.cuda.synchronize(self._device)
        return result, launched - begun >= BOUND_BY_LAUNCHES * (time.perf_counter() - begun)

    def record(self, run: Callable[[], Tree]) -> tuple[Callable[[], None], Tree]:
        graph, asking = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        # The outer context brings the stream back that was current, which a capture that fails leaves behind.
        try:
            with on_device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_stream(asking)
                for _ in range(NUM_WARM_UPS):
                    run()
                # Other threads may go on with what a capture in this one could not do.
                modes = {"pool": self._pools[-1], "stream": self._stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(graph, **modes):
                    result = run()
        except RuntimeError as error:
            gc.collect()
            torch.cuda.empty_cache()
            if is_lost(self._device, RuntimeError()):  # of which the capture's own error is no sign
                raise
            self._begin_anew()
            raise CaptureError(in_one_line(error)) from error
        asking.wait_stream(self._stream)
        return graph.replay, result

    def num_bytes(self) -> int:
        pools = {tuple(pool) for pool in self._pools}
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) in pools)


@dataclass
class _Shape:
    """What is known of the calls of one shape: how many came, and whether they are bound by launches."""

    num_calls: int = 0
    bound: bool = False


@dataclass
class _Graph:
    """A recorded call: the buffers that it reads, what runs it, and the tensors that it writes."""

    inputs: Sequence[Tensor]
    replay: Callable[[], None]
    result: Tree = field(repr=False)


class StepGraphs:
    """Graphs by shape. The first call of a shape runs as it is, the second is measured, the third is recorded.

    Args:
        device: of CUDA.
        recorder: records; None is the device's.
        max_graphs: that are kept.

    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None, max_graphs: int = MAX_GRAPHS) -> None:
        self._recorder = recorder or CudaRecorder(device)
        self._max_graphs = max_graphs
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept now."""
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Memory that they hold."""
        inputs = [tensor for graph in self._graphs.values() for tensor in graph.inputs]
        return self._recorder.num_bytes() + sum(tensor.nbytes for tensor in inputs)

    def __call__(self, forwards: Sequence[Forward], make: Make) -> list[Tree]:
        """Make forwards, those of steps from graphs where they pay."""
        return [self._make(forward, lambda each: make([each])[0]) for forward in forwards]

    def _make(self, forward: Forward, make: Callable[[Forward], Tree]) -> Tree:
        call = forward.call
        if call.signature is None:
            return make(forward)
        key = (forward.form, *shape_of(call))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return _replayed(self._graphs[key], call)
        shape = self._shape(key)
        shape.num_calls += 1
        if shape.num_calls == 1:
            return make(forward)
        if shape.num_calls == 2:
            result, shape.bound = self._recorder.measure(lambda: make(forward))
            return result
        if not shape.bound:
            return make(forward)
        while len(self._graphs) >= self._max_graphs:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._recorded(forward, make)
        except CaptureError as reason:
            shape.bound = False  # as far as graphs are concerned: it stays eager
            logger.warning("calls of %s stay without a graph: %s", call.component, reason)
            return make(forward)
        return _replayed(self._graphs[key], call)

    def _shape(self, key: Hashable) -> _Shape:
        shape = self._shapes.setdefault(key, _Shape())
        self._shapes.move_to_end(key)
        while len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        return shape

    def _recorded(self, forward: Forward, make: Callable[[Forward], Tree]) -> _Graph:
        inputs = map_tree(arguments_of(forward.call), torch.clone)
        kwargs, shared = inputs
        buffered = replace(forward, call=replace(forward.call, kwargs=kwargs, shared_kwargs=shared))
        replay, result = self._recorder.record(lambda: make(buffered))
        return _Graph(list(leaves(inputs)), replay, result)


def arguments_of(call: ModelCall) -> tuple[Tree, Tree]:
    """Return a call's arguments, those with a batch dimension first, each in the order of their names."""
    return dict(sorted(call.kwargs.items())), dict(sorted(call.shared_kwargs.items()))


def shape_of(call: ModelCall) -> tuple[Hashable, ...]:
    """Return what calls of one graph have in common: what may be stacked, and what their arguments look like."""
    kwargs, shared = arguments_of(call)
    layouts = tuple((tuple(each.shape), each.stride(), each.dtype) for each in leaves([kwargs, shared]))
    return (call.stack_key, *kwargs, *shared, layouts)


def refuse_graphs(pipeline: ComposedPipeline) -> None:
    """Refuse what graphs cannot do.

    Raises:
        InvalidParameterError: on another device than CUDA, or of another package's pipeline.

    """
    if not pipeline.native:
        takes = f"none with {pipeline.schema.pipeline_name}: what another package calls a step with may lie anywhere"
        raise InvalidParameterError("cuda_graphs", "steps", takes)
    if pipeline.device.type != "cuda":
        raise InvalidParameterError("cuda_graphs", "steps", f"none on {pipeline.device.type}: graphs are CUDA's")


def _replayed(graph: _Graph, call: ModelCall) -> Tree:
    """Run a graph on a call's arguments, and return copies of what it wrote."""
    for buffer, tensor in zip(graph.inputs, leaves(arguments_of(call)), strict=True):
        buffer.copy_(tensor)
    graph.replay()
    return map_tree(graph.result, torch.clone)
