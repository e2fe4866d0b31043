"""Outputs are seeds, and components may have dtypes of their own: no reference is needed."""

from __future__ import annotations

import pytest
import torch

from safelight.testing.models import TinyModels, load, requests, run_alone, same, single
from safelight.testing.recipes import Recipe
from safelight.testing.suites.suite import Suite


class OutputsSuite(Suite):
    """What holds for the outputs of any pipeline."""

    def test_outputs_can_be_had_again_alone(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Several outputs are the seeds `seed`, `seed + 1` and so on."""
        pipeline = tiny_models.ours(recipe)
        fields = {**recipe.cases[0].fields, "seed": 40}
        together = [run_alone(pipeline, req) for req in requests(pipeline, {**fields, "n": 3})]
        each = [run_alone(pipeline, requests(pipeline, {**fields, "seed": 40 + index})[0]) for index in range(3)]
        assert same(together, each)
        assert not torch.equal(together[0], together[1])

    @pytest.mark.parametrize("component", ["vae", "text_encoder", "transformer"])
    def test_a_component_may_have_its_own_dtype(self, recipe: Recipe, tiny_models: TinyModels, component: str) -> None:
        """One in float32 while the rest is bfloat16."""
        folder, fields = tiny_models.folder(recipe), single(recipe.cases[1])
        mixed = load(folder, dtype="bfloat16", component_dtypes={component: "float32"})
        dtypes = {
            name: list(module.parameters())[-1].dtype  # the first may be one that is always float32
            for name, module in mixed.modules().items()
        }
        prescribed = mixed.config.precisions.keys() & dtypes.keys()
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {component} | prescribed
        ours = tiny_models.ours(recipe)
        (req,), (exact,) = requests(mixed, fields), requests(ours, fields)
        difference = (run_alone(mixed, req) - run_alone(ours, exact)).abs().mean()
        assert 0 < float(difference) < 0.05
