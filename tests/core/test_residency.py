"""Alternates come to the device when a call names them, and leave it for the next, with their weights unchanged."""

import pytest
import torch
from torch import nn

from safelight.core.residency import Residency


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.fixture
def modules():
    return {"transformer": nn.BatchNorm1d(3), "transformer_2": nn.Linear(3, 2), "vae": nn.Linear(2, 2)}


def test_one_alternate_at_a_time_is_on_the_device(modules):
    """The meta device stands for an accelerator: what lies there is not on the host."""
    host = {name: [tensor.data_ptr() for tensor in weights(module)] for name, module in modules.items()}
    values = {name: [tensor.detach().clone() for tensor in weights(module)] for name, module in modules.items()}
    residency = Residency(modules, ("transformer", "transformer_2"), torch.device("meta"))
    on_device = lambda name: {tensor.device.type for tensor in weights(modules[name])} == {"meta"}  # noqa: E731
    assert [residency.is_resident(name) for name in modules] == [False, False, True]
    with torch.inference_mode():
        assert residency.component("transformer") is modules["transformer"]
        assert on_device("transformer") and not on_device("transformer_2") and not on_device("vae")
        residency.component("transformer")
        residency.component("vae")
        assert residency.num_swaps == 1
        residency.component("transformer_2")
    assert residency.num_swaps == 2
    assert on_device("transformer_2") and not on_device("transformer")
    # The host's memory is the one it had: nothing was copied back.
    assert [tensor.data_ptr() for tensor in weights(modules["transformer"])] == host["transformer"]
    for tensor, value in zip(weights(modules["transformer"]), values["transformer"], strict=True):
        assert torch.equal(tensor, value)


def test_without_alternates_everything_stays(modules):
    residency = Residency(modules, (), torch.device("meta"))
    assert all(residency.is_resident(name) for name in modules)
    residency.component("transformer")
    assert residency.num_swaps == 0
    assert {tensor.device.type for tensor in weights(modules["transformer"])} == {"cpu"}
