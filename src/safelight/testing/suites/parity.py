"""A pipeline is held to its reference: token ids, schedule, noise, every step, pixels, defaults."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import torch

from safelight.testing.models import TinyModels, load, requests
from safelight.testing.recipes import Case, Recipe
from safelight.testing.reference import difference_of_states, distance, encoders_of, encodings, run_ours, run_reference
from safelight.testing.report import OtherwiseRow, ParityRow
from safelight.testing.suites.suite import Suite

TOLERANCE = 1e-4
FEWEST_DEFAULTS = 6
"""Arguments of a reference whose defaults are compared, at least: with fewer, names are others."""


class ParitySuite(Suite):
    """Needs a reference: Diffusers' pipeline of the same name, or what the recipe loads."""

    def test_parity(self, recipe: Recipe, case: Case, tiny_models: TinyModels, parity_rows: list[ParityRow]) -> None:
        """Everything that is made on the way."""
        ours, reference = tiny_models.ours(recipe, case.variant), tiny_models.reference(recipe, case.variant)
        reqs = requests(ours, case.fields)
        expected = run_reference(reference, recipe, reqs)
        latent_difference = pixel_difference = 0.0
        with encodings(encoders_of(ours, recipe)) as made:
            for index, req in enumerate(reqs):
                noise, steps = run_ours(ours, req)
                assert torch.equal(noise, expected.noise[index : index + 1]), "the initial noise is another"
                assert req.sigmas == expected.sigmas
                assert req.timesteps is not None and torch.equal(req.timesteps, expected.timesteps)
                assert len(steps) == len(expected.steps) == req.num_inference_steps
                for step, theirs in zip(steps, expected.steps, strict=True):
                    latent_difference = max(latent_difference, float((step[0] - theirs[index]).abs().max()))
                pixel_difference = max(pixel_difference, distance(req, expected.pixels[index]))
        assert made.keys() == expected.made.keys(), "the token ids are others"
        state_difference = difference_of_states(made, expected.made)
        assert max(state_difference, latent_difference, pixel_difference) <= TOLERANCE
        assert float(np.std(np.asarray(expected.pixels))) > 0.01, "a flat picture shows nothing"
        differences = (state_difference, latent_difference, pixel_difference)
        parity_rows.append(ParityRow(recipe.pipeline_name, case.name, "equal", "equal", "equal", *differences))

    def test_what_the_installed_reference_does_otherwise(
        self,
        recipe: Recipe,
        tiny_models: TinyModels,
        monkeypatch: pytest.MonkeyPatch,
        otherwise_rows: list[OtherwiseRow],
    ) -> None:
        """Ours is the authors' way; without it, it is the installed reference's: there is no second difference.

        It fails once the installed reference does as the authors do: then the recipe's `difference` is to go.
        """
        case, ours = recipe.cases[0], tiny_models.ours(recipe)
        assert recipe.difference is not None
        (req,) = requests(ours, {**case.fields, "n": 1})
        installed = run_reference(tiny_models.reference(recipe, as_installed=True), recipe, [req])
        with encodings(encoders_of(ours, recipe)) as made:
            run_ours(ours, req)
        (alike,) = requests(ours, {**case.fields, "n": 1})
        with monkeypatch.context() as patch, encodings(encoders_of(ours, recipe)) as made_alike:
            recipe.difference.unlearn(patch)
            run_ours(ours, alike)
        states, pixels = difference_of_states(made, installed.made), distance(req, installed.pixels[0])
        assert difference_of_states(made_alike, installed.made) <= TOLERANCE
        assert distance(alike, installed.pixels[0]) <= TOLERANCE
        assert min(states, pixels) > 10 * TOLERANCE, "a difference that nobody would see"
        otherwise_rows.append(OtherwiseRow(recipe.pipeline_name, case.name, recipe.difference.sentence, states, pixels))

    def test_defaults_are_those_of_the_signature(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """What a call without arguments does is what the reference does."""
        schema = tiny_models.ours(recipe).schema
        stated = signature(recipe.reference_class().__call__).parameters
        to_ours = {theirs: name for name, theirs in recipe.to_diffusers.items()} | dict(schema.params_cls.aliases)
        compared = 0
        for theirs, parameter in stated.items():
            name = to_ours.get(theirs, theirs)
            if name not in schema.params_cls.options() or name in recipe.not_in_signature:
                continue
            if parameter.default is not parameter.empty:
                assert schema.defaults.get(name) == parameter.default, name
                compared += 1
        assert compared >= FEWEST_DEFAULTS

    def test_default_size_is_the_references(self, recipe: Recipe, tiny_models: TinyModels) -> None:
        """Height and width, where the reference computes them."""
        defaults = tiny_models.ours(recipe).schema.defaults
        expected = recipe.default_size(tiny_models.reference(recipe))
        assert (defaults.get("height"), defaults.get("width")) == expected

    def test_every_argument_of_the_reference_is_known_or_refused_by_name(
        self, recipe: Recipe, tiny_models: TinyModels
    ) -> None:
        """Nothing is silently ignored."""
        params_cls = tiny_models.ours(recipe).schema.params_cls
        known = params_cls.options().keys() | params_cls.aliases.keys() | params_cls.refused.keys()
        arguments = set(signature(recipe.reference_class().__call__).parameters) - {"self"}
        assert arguments - known == set(), "each goes into `options`, `aliases` or `refused` of the parameters"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_follows_the_reference(self, recipe: Recipe, tiny_models: TinyModels, dtype: str) -> None:
        """Within what rounding does."""
        case, folder = recipe.cases[0], tiny_models.folder(recipe)
        ours = load(folder, dtype=dtype)
        reference = recipe.reference(folder, dtype=getattr(torch, dtype))
        reqs = requests(ours, case.fields)
        expected = run_reference(reference, recipe, reqs)
        noise, steps = run_ours(ours, reqs[0])
        assert torch.equal(noise, expected.noise[:1])
        scale = float(expected.steps[-1].float().abs().max())
        difference = float((steps[-1].float() - expected.steps[-1].float()).abs().max())
        assert difference <= 0.03 * scale
