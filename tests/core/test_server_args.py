"""Settings of an engine: what is refused at once, and what is read out of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.core.server_args import PARALLEL_SIZES, ServerArgs
from safelight.errors import InvalidParameterError


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8'; it takes auto, float32, bfloat16, float16"),
        ({"offload": "all"}, "offload: got 'all'; it takes none, alternates, components, blocks, auto"),
        ({"component_dtypes": {"vae": "auto"}}, "component_dtypes['vae']: got 'auto'; it takes float32, bfloat16"),
        ({"memory_limit": "much"}, "memory_limit: got 'much'; it takes bytes above 0"),
        ({"conditioning_cache": "-1"}, "conditioning_cache: got '-1'; it takes bytes above 0"),
        ({"devices": 0}, "devices: got 0; it takes a whole number of at least 1"),
        ({"devices": 3, "tp_size": 2}, "devices: got 3; it takes 2, which is tp_size 2; or nothing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, says):
    with pytest.raises(InvalidParameterError) as caught:
        ServerArgs(**given)
    assert says in str(caught.value)


def test_devices_are_the_product_of_the_sizes_or_their_number():
    assert ServerArgs().num_devices() == 1
    assert ServerArgs(devices=6).num_devices() == 6
    sizes: dict[str, Any] = dict.fromkeys(PARALLEL_SIZES, 2)
    assert ServerArgs(**sizes).num_devices() == 16
    assert ServerArgs(tp_size=2, ring_degree=3, devices=6).num_devices() == 6


def test_sizes_are_bytes():
    args = ServerArgs(memory_limit="1.5KiB", conditioning_cache="2kB")
    assert (args.memory_limit_bytes(), args.conditioning_cache_bytes()) == (1536, 2000)
    args = ServerArgs(conditioning_cache="0")
    assert (args.memory_limit_bytes(), args.conditioning_cache_bytes()) == (None, 0)


def test_a_components_dtype_is_its_own_then_the_models_then_the_engines():
    args = ServerArgs(device="cpu", component_dtypes={"vae": "float16"})
    assert args.component_dtype("vae", "bfloat16") is torch.float16
    assert args.component_dtype("text_encoder", "bfloat16") is torch.bfloat16
    assert args.component_dtype("transformer") is torch.float32
    assert ServerArgs(device="cpu", dtype="bfloat16").component_dtype("transformer") is torch.bfloat16


def test_a_device_that_is_not_there_is_named():
    assert ServerArgs(device="cpu").torch_device() == torch.device("cpu")
    with pytest.raises(InvalidParameterError, match="device: got 'cuda:99'; it takes auto, cpu, or a device that"):
        ServerArgs(device="cuda:99").torch_device()
