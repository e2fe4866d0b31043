"""A network's measures, as its JSON has them."""

from __future__ import annotations

import pytest

from safelight.core.architecture import UNKNOWN_WIDTH, Architecture


@pytest.mark.parametrize(
    ("configs", "measures"),
    [
        ({"transformer": {"num_attention_heads": 24, "attention_head_dim": 128}}, (3072, 4 * 3072)),
        ({"transformer": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}}, (1536, 8960)),
        ({"unet": {"block_out_channels": [320, 640, 1280], "attention_head_dim": 8}}, (1280, 4 * 1280)),
        ({"vae": {"dim": 96}, "transformer": {"dim": 8}, "transformer_2": {"dim": 16}}, (8, 32)),
        ({"transformer": {"num_heads": "many", "hidden_size": -1}}, (UNKNOWN_WIDTH, 4 * UNKNOWN_WIDTH)),
        ({}, (UNKNOWN_WIDTH, 4 * UNKNOWN_WIDTH)),
    ],
)
def test_width_and_mlp(configs, measures):
    found = Architecture.of(configs)
    assert (found.width, found.mlp_width) == measures


def test_attention_takes_as_much_as_all_else_at_the_balance():
    found = Architecture(3072, 12288)
    per_token = 2 * (4 * found.width**2 + 2 * found.width * found.mlp_width)
    assert found.balance == 18432 and 4 * found.width * found.balance == per_token
    assert found.values_per_token == 15360
