"""What fused operations are checked on: every form that models ask for."""

from __future__ import annotations

import itertools

import pytest
import torch

from safelight.acceleration.fused.examples import EXAMPLES, examples
from safelight.layers import modulation

SIZES = {"norm_modulate": (8,), "gated_residual": (8,), "qk_norm_rotary": (2, 8, 0), "joint_qk_norm_rotary": (2, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_modulated_norm_is_checked_with_gates_and_without_at_every_number_of_rows_and_groups(dtype):
    steering = {dtype, torch.float32}
    forms = set()
    for residual, gate, _, weight, _, scale, _, _, group_size in examples(
        modulation.residual_norm, (8, 0), dtype, torch.device("cpu")
    ):
        assert weight is None
        forms.add((residual.shape[0], group_size is not None, gate is not None, scale.dtype))
    assert forms == set(itertools.product((1, 2), (False, True), (False, True), steering))


def test_a_norm_with_weights_has_gates():
    for made in examples(modulation.residual_norm, (8, 1), torch.float32, torch.device("cpu")):
        assert made[1] is not None and made[3].shape == (8,)


@pytest.mark.parametrize("plain", [each for each in EXAMPLES if each is not modulation.residual_norm])
def test_arguments_fit_the_operation(plain):
    made = list(examples(plain, SIZES[plain.__name__], torch.float32, torch.device("cpu")))
    assert len(made) == 4
    for arguments in made:
        plain(*arguments)
