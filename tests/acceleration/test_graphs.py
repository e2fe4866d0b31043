"""Graphs of model calls: the right graph, the right inputs, results of their own; on CUDA, equal bytes as well."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import as_tensor
from safelight import ServerArgs
from safelight.acceleration.graphs import CaptureError, CudaRecorder, Recorder, StepGraphs, refuse_graphs
from safelight.core.calls import CallKey, ModelCall
from safelight.core.form import Form
from safelight.errors import InvalidParameterError
from tests.calls import through


class FakeRecorder(Recorder):
    """Runs a recorded function again on its buffers, and writes into the tensors of the first time, as a graph does."""

    def __init__(self, bound=True, refuses=lambda result: False):
        self.bound = bound
        self.refuses = refuses
        self.num_recorded = self.num_measured = self.num_refused = 0

    def measure(self, run):
        self.num_measured += 1
        return run(), self.bound

    def record(self, run):
        result = run()
        if self.refuses(result):
            self.num_refused += 1
            raise CaptureError("operation not permitted when stream is capturing")
        self.num_recorded += 1
        parts = result if isinstance(result, tuple) else (result,)

        def replay():
            again = run()
            for part, new in zip(parts, again if isinstance(again, tuple) else (again,), strict=True):
                part.copy_(new)

        return replay, result

    def num_bytes(self):
        return 1000


def call(rows, component="transformer", signature=(), dtype=torch.float32, shared=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator).to(dtype)
    return ModelCall(
        component, {"hidden": hidden}, {"table": torch.full((5,), shared)}, signature, CallKey("r", "cond", 0)
    )


def compute(call):
    return call.kwargs["hidden"].double().cumsum(-1) * call.shared_kwargs["table"]


@pytest.fixture
def recorder():
    return FakeRecorder()


@pytest.fixture
def graphs(recorder):
    return StepGraphs(torch.device("cpu"), recorder, max_graphs=3)


def test_every_call_has_the_bytes_of_its_own_arguments(graphs, recorder):
    """Shared arguments too: two requests of one signature have equal ones, and the graph must not depend on it."""
    make = through(graphs, compute)
    results = []
    for seed in range(7):
        asked = call(1 + seed % 2, shared=1.0 + seed, seed=seed)
        results.append((make(asked), compute(asked)))
    assert recorder.num_measured == recorder.num_recorded == graphs.num_graphs == 2
    assert all(torch.equal(result, expected) for result, expected in results), "earlier results are left alone"


def test_a_graph_is_of_one_component_signature_shape_dtype_and_form(graphs, recorder):
    make = through(graphs, compute)
    kinds = [
        call(1),
        call(2),
        call(1, component="transformer_2"),
        call(1, signature=(64, 96)),
        call(1, dtype=torch.bfloat16),
    ]
    for kind in kinds:
        for _ in range(2):
            make(kind)
    assert recorder.num_recorded == 0 and recorder.num_measured == len(kinds)
    for kind in kinds:
        assert torch.equal(make(kind), compute(kind))
    assert recorder.num_recorded == len(kinds)
    other = through(graphs, lambda asked: compute(asked) + 1, Form("compiled"))
    for _ in range(3):
        assert torch.equal(other(kinds[-1]), compute(kinds[-1]) + 1)
    assert torch.equal(make(kinds[-1]), compute(kinds[-1]))


def test_the_graph_that_was_not_used_for_longest_goes(graphs, recorder):
    make = through(graphs, compute)
    for rows in (1, 2, 3):
        for _ in range(3):
            make(call(rows))
    make(call(1))
    for _ in range(3):
        make(call(4))
    assert graphs.num_graphs == 3 and recorder.num_recorded == 4
    make(call(1))
    assert recorder.num_recorded == 4
    make(call(2))
    assert recorder.num_recorded == 5, "it was dropped, and is recorded again at once"
    assert graphs.num_bytes == 1000 + sum((rows * 5 + 5) * 4 for rows in (1, 2, 4))


def test_a_call_that_is_made_alone_has_no_graph(graphs, recorder):
    """What an encoder or a VAE is given may change under it."""
    make = through(graphs, compute)
    for seed in range(4):
        assert torch.equal(make(call(1, signature=None, seed=seed)), compute(call(1, seed=seed)))
    assert recorder.num_measured == recorder.num_recorded == 0


def test_what_is_not_bound_by_launches_runs_as_it_is():
    recorder = FakeRecorder(bound=False)
    make = through(StepGraphs(torch.device("cpu"), recorder), compute)
    for _ in range(5):
        make(call(1))
    assert (recorder.num_measured, recorder.num_recorded) == (1, 0)


def test_what_cannot_be_recorded_stays_eager_and_is_not_tried_again(caplog):
    """Other shapes are recorded all the same."""
    recorder = FakeRecorder(refuses=lambda result: len(result) == 2)
    graphs = StepGraphs(torch.device("cpu"), recorder)
    make = through(graphs, compute)
    for seed in range(6):
        for rows in (1, 2):
            asked = call(rows, seed=seed)
            assert torch.equal(as_tensor(make(asked)), compute(asked))
    assert (recorder.num_refused, recorder.num_recorded, graphs.num_graphs) == (1, 1, 1)
    assert caplog.text.count("stay without a graph: operation not permitted") == 1


def test_results_of_several_tensors(graphs):
    make = through(graphs, lambda asked: (compute(asked), compute(asked) * 2))
    for seed in range(5):
        picture, sound = make(call(2, seed=seed))
        assert torch.equal(picture * 2, sound) and torch.equal(picture, compute(call(2, seed=seed)))


def test_graphs_are_refused_without_cuda(fault_pipeline_of):
    with pytest.raises(InvalidParameterError, match="cuda_graphs: got 'steps'; it takes none on cpu"):
        refuse_graphs(fault_pipeline_of(cuda_graphs="steps"))


def test_an_unknown_setting_is_refused():
    with pytest.raises(InvalidParameterError, match="cuda_graphs: got 'always'"):
        ServerArgs(cuda_graphs="always")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_replay_has_the_bytes_of_the_call(tiny_flux):
    """On the device, over two sizes whose calls take turns."""
    from safelight.acceleration.compilation import canonical_request, first_calls

    pipeline = tiny_flux(device="cuda", dtype="bfloat16", cuda_graphs="steps")
    (asked,) = first_calls(pipeline, canonical_request(pipeline), pipeline.denoisers())

    class Always(CudaRecorder):
        def measure(self, run):
            return run(), True

    graphs = StepGraphs(pipeline.device, Always(pipeline.device))
    make = through(graphs, pipeline.forward)
    with torch.inference_mode():
        for scale in (1.0, 0.5, -2.0, 0.25, 3.0):
            scaled = {**asked.kwargs, "hidden_states": asked.kwargs["hidden_states"] * scale}
            each = ModelCall(asked.component, scaled, asked.shared_kwargs, asked.signature, asked.key)
            assert torch.equal(as_tensor(make(each)), as_tensor(pipeline.forward(each)))
    assert graphs.num_graphs == 1
