"""A request's copy of a pipeline: all its calls go to the driver, and nothing of it reaches the shared one."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch
from torch import nn

from safelight.backends.borrowing import POSITIONAL, borrowed, by_name, names_of_networks
from safelight.backends.solvers import Steps

DEVICE = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.mode = "plain"

    def forward(self, hidden, scale=1.0):
        return self.inner(hidden) * scale


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.blocks = Block(), nn.ModuleList([Block(), Block()])

    def forward(self, hidden, *, scale=1.0, **extra):
        for block in self.blocks:
            hidden = block(hidden, scale)
        return hidden + sum(extra.values())

    def encode(self, pixels, return_dict=True):
        return self.block(pixels)

    def prepare(self, hidden):
        return self.block(hidden) + 1

    def set_attn_processor(self, mode):
        for block in (self.block, *self.blocks):
            block.mode = mode


class Caching(Network):
    def cache_context(self, name, **fields):
        raise AssertionError("the driver enters it, not the pipeline")


class Pipe(diffusers.DiffusionPipeline):  # type: ignore[misc]  # the package has no types
    def __init__(self, network, scheduler):
        super().__init__()
        self.network, self.scheduler = network, scheduler


class Outer(Pipe):
    def __init__(self, network, scheduler, other):
        super().__init__(network, scheduler)
        self.inner_pipe = Pipe(network, scheduler)
        self.other_pipe = Pipe(other, diffusers.DDIMScheduler())


@pytest.fixture
def handed():
    return []


def of(pipe, handed):
    """Return a copy that makes each call at once, as the driver would."""
    networks = names_of_networks(pipe)

    def hand(call):
        handed.append(call)
        module = networks[call.component] if call.own is None else call.own
        path, _, method = call.method.rpartition(".")
        part = module.get_submodule(path)
        arguments = dict(call.arguments)
        args = arguments.pop(POSITIONAL, ())
        return (part if method == "forward" else getattr(part, method))(*args, **arguments)

    return borrowed(pipe, hand, Steps(torch.Generator(), lambda *_: None), DEVICE)


def test_calls_go_to_the_driver_whole_and_by_the_names_of_their_arguments(handed):
    torch.manual_seed(0)
    pipe = Pipe(Network(), diffusers.DDIMScheduler())
    own, hidden = of(pipe, handed), torch.randn(2, 4)
    assert torch.equal(own.network(hidden, scale=2.0, more=hidden), pipe.network(hidden, scale=2.0, more=hidden))
    assert torch.equal(own.network.encode(hidden, return_dict=False), pipe.network.encode(hidden))
    assert [(call.component, call.method) for call in handed] == [("network", "forward"), ("network", "encode")]
    assert handed[0].arguments.keys() == {"hidden", "scale", "more"} and handed[0].context is None
    assert handed[1].arguments.keys() == {"pixels", "return_dict"}


def test_what_is_done_beside_whole_calls_hands_over_its_parts(handed):
    pipe = Pipe(Network(), diffusers.DDIMScheduler())
    own, hidden = of(pipe, handed), torch.randn(2, 4)
    assert torch.equal(own.network.prepare(hidden), pipe.network.prepare(hidden))
    assert torch.equal(own.network.blocks[1].inner(hidden), pipe.network.blocks[1].inner(hidden))
    assert [call.method for call in handed] == ["block.forward", "blocks.1.inner.forward"]


def test_a_copy_is_of_the_same_classes_and_has_the_same_weights(handed):
    pipe = Pipe(Network(), diffusers.DDIMScheduler())
    own = of(pipe, handed)
    assert (
        isinstance(own, Pipe) and isinstance(own.network, Network) and isinstance(own.scheduler, type(pipe.scheduler))
    )
    assert type(own).__name__ == "Pipe" and own.scheduler is not pipe.scheduler
    for mine, theirs in zip(own.network.parameters(), pipe.network.parameters(), strict=True):
        assert mine is theirs
    assert inspect.signature(own.network.forward).parameters.keys() == {"hidden", "scale", "extra"}
    assert own.device == own._execution_device == DEVICE


def test_the_context_of_caches_goes_with_the_call(handed):
    own, hidden = of(Pipe(Caching(), diffusers.DDIMScheduler()), handed), torch.randn(2, 4)
    with own.network.cache_context("cond", step_index=3):
        own.network(hidden)
    own.network(hidden)
    assert [call.context for call in handed] == [("cond", ("step_index", 3)), None]


def test_nested_pipelines_are_copied_and_share_what_they_shared(handed):
    network = Network()
    pipe = Outer(network, diffusers.DDIMScheduler(), Network())
    assert names_of_networks(pipe) == {"network": network, "other_pipe.network": pipe.other_pipe.network}
    own, hidden = of(pipe, handed), torch.randn(1, 4)
    assert own.inner_pipe.network is own.network and own.inner_pipe.scheduler is own.scheduler
    assert own.other_pipe is not pipe.other_pipe and own.other_pipe.scheduler is not pipe.other_pipe.scheduler
    own.inner_pipe.network(hidden)
    own.other_pipe.network(hidden)
    assert [call.component for call in handed] == ["network", "other_pipe.network"]


def test_what_a_request_changes_in_a_network_is_its_own(handed):
    pipe = Pipe(Network(), diffusers.DDIMScheduler())
    first, second, hidden = of(pipe, handed), of(pipe, handed), torch.randn(1, 4)
    first.network.set_attn_processor("other")
    first.network(hidden)
    second.network(hidden)
    changed = handed[0].own
    assert changed.block.mode == "other" == first.network.block.mode
    assert handed[1].own is None and pipe.network.block.mode == "plain" == second.network.block.mode
    assert [mine is theirs for mine, theirs in zip(changed.parameters(), pipe.network.parameters(), strict=True)]
    first.network.set_attn_processor("third")
    assert handed[0].own is changed and changed.block.mode == "third", "one copy serves all its changes"


@pytest.mark.parametrize(
    "how", [lambda n: n.to(dtype=torch.float64), lambda n: n.to(torch.bfloat16), lambda n: n.half()]
)
def test_converted_weights_are_a_requests_own(how, handed):
    pipe = Pipe(Network(), diffusers.DDIMScheduler())
    own = of(pipe, handed)
    assert how(own.network) is own.network
    dtype = next(own.network.block.parameters()).dtype
    assert dtype != torch.float32 == next(pipe.network.parameters()).dtype
    made = own.network(torch.randn(1, 4, dtype=dtype))
    assert made.dtype == dtype and handed[0].own is not None


def test_a_conversion_that_changes_nothing_copies_nothing(handed):
    own = of(Pipe(Network(), diffusers.DDIMScheduler()), handed)
    assert own.network.to(torch.float32).float().to("cpu") is own.network
    own.network(torch.randn(1, 4))
    assert handed[0].own is None


def test_arguments_without_a_name_stay_without():
    def taking(self, first, *rest, last=0):
        """Stand for a method."""

    assert by_name(taking, (1, 2, 3), {"last": 4}) == {POSITIONAL: (1, 2, 3), "last": 4}
    assert by_name(taking, (1,), {}) == {"first": 1}
    with pytest.raises(TypeError):
        by_name(taking, (), {})


def test_a_copied_solver_of_a_copy_is_counted_with_it():
    told = []
    steps = Steps(torch.Generator(), lambda *done: told.append(done))
    assert copy.deepcopy(steps) is steps
