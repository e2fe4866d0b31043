"""Every pipeline is held to Diffusers: token ids, schedule, noise, every step, pixels, defaults."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from inspect import signature
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.registry import pipelines
from safelight.loading.loader import load_pipeline
from tests.families.conftest import requests
from tests.families.report import OtherwiseRow, ParityRow
from tests.recipes import all_recipes

TOLERANCE = 1e-4
NOT_PASSED = ("seed", "n", "fps")
"""The reference has a list of generators, a list of prompts, and leaves the frame rate to whoever writes the file."""


def test_every_registered_pipeline_has_a_recipe():
    assert set(pipelines()) == set(all_recipes())


def test_parity(recipe, case, models, parity_rows):
    ours, reference = models.ours(recipe, case.variant), models.reference(recipe, case.variant)
    reqs = requests(ours, case.fields)
    expected = run_reference(reference, recipe, reqs, case)
    latent_difference = pixel_difference = 0.0
    with encodings(parts_of(ours, recipe)) as made:
        for index, req in enumerate(reqs):
            noise, steps = run_ours(ours, req)
            assert torch.equal(noise, expected.noise[index : index + 1]), "the initial noise is another"
            assert req.sigmas == expected.sigmas
            assert torch.equal(req.timesteps, expected.timesteps)
            assert len(steps) == len(expected.steps) == req.num_inference_steps
            for step, wanted in zip(steps, expected.steps, strict=True):
                latent_difference = max(latent_difference, float((step[0] - wanted[index]).abs().max()))
            pixel_difference = max(pixel_difference, distance(req, expected.pixels[index]))
    assert made.keys() == expected.made.keys(), "the token ids are others"
    state_difference = difference_of_states(made, expected.made)
    assert max(state_difference, latent_difference, pixel_difference) <= TOLERANCE
    assert float(np.std(np.asarray(expected.pixels))) > 0.01, "a flat picture shows nothing"
    differences = (state_difference, latent_difference, pixel_difference)
    parity_rows.append(ParityRow(recipe.pipeline_name, case.name, "equal", "equal", "equal", *differences))


def test_what_the_installed_reference_does_otherwise(recipe, models, monkeypatch, otherwise_rows):
    """Ours is the authors' way; without it, it is the installed reference's, so that there is no second difference.

    It fails once the installed reference does as the authors do: then the recipe's `difference` is to go.
    """
    case, ours = recipe.cases[0], models.ours(recipe)
    (req,) = requests(ours, {**case.fields, "n": 1})
    installed = run_reference(models.reference(recipe, as_installed=True), recipe, [req], case)
    with encodings(parts_of(ours, recipe)) as made:
        run_ours(ours, req)
    (alike,) = requests(ours, {**case.fields, "n": 1})
    with monkeypatch.context() as patch, encodings(parts_of(ours, recipe)) as made_alike:
        recipe.difference.unlearn(patch)
        run_ours(ours, alike)
    states, pixels = difference_of_states(made, installed.made), distance(req, installed.pixels[0])
    assert difference_of_states(made_alike, installed.made) <= TOLERANCE
    assert distance(alike, installed.pixels[0]) <= TOLERANCE
    assert min(states, pixels) > 10 * TOLERANCE, "a difference that nobody would see"
    otherwise_rows.append(OtherwiseRow(recipe.pipeline_name, case.name, recipe.difference.sentence, states, pixels))


def test_defaults_are_those_of_the_signature(recipe, models):
    schema = models.ours(recipe).schema
    stated = signature(recipe.reference_class().__call__).parameters
    to_ours = {theirs: name for name, theirs in recipe.to_diffusers.items()} | schema.params_cls.aliases
    compared = 0
    for theirs, parameter in stated.items():
        name = to_ours.get(theirs, theirs)
        if name not in schema.params_cls.options() or name in recipe.not_in_signature:
            continue
        if parameter.default is not parameter.empty:
            assert schema.defaults.get(name) == parameter.default, name
            compared += 1
    assert compared >= 6


def test_default_size_is_the_references(recipe, models):
    defaults = models.ours(recipe).schema.defaults
    expected = recipe.default_size(models.reference(recipe))
    assert (defaults.get("height"), defaults.get("width")) == expected


def test_every_argument_of_the_reference_is_known_or_refused_by_name(recipe, models):
    params_cls = models.ours(recipe).schema.params_cls
    known = params_cls.options().keys() | params_cls.aliases.keys() | params_cls.refused.keys()
    arguments = set(signature(recipe.reference_class().__call__).parameters) - {"self"}
    assert arguments - known == set()


def test_encoders_that_take_images_are_told_where_they_are(models, monkeypatch):
    """Without it some would count the tokens of an image like words, and say nothing."""
    told: Counter[str] = Counter()

    def check(encoder, _args, kwargs):
        if kwargs.get("pixel_values") is not None:
            assert not {"mm_token_type_ids", "position_ids"}.isdisjoint(kwargs)
            told[type(encoder).__name__] += 1

    for recipe in all_recipes().values():
        case = next((case for case in recipe.cases if "image" in case.fields), None)
        if case is None:
            continue
        pipeline = models.ours(recipe, case.variant)
        taking = [m for m in pipeline.modules().values() if "mm_token_type_ids" in signature(m.forward).parameters]
        with monkeypatch.context() as patch, ExitStack() as hooks:
            if recipe.patch is not None:
                recipe.patch(patch)
            for module in taking:
                hooks.enter_context(module.register_forward_pre_hook(check, with_kwargs=True))
            run_alone(pipeline, requests(pipeline, {**case.fields, "n": 1})[0])
    assert told.total() >= 2


class Expected:
    """What the reference made of a case; the batch comes first."""

    noise: torch.Tensor
    steps: list[torch.Tensor]
    sigmas: list[float]
    timesteps: torch.Tensor
    pixels: np.ndarray
    made: dict[tuple[Any, ...], list[torch.Tensor]]


def distance(req, wanted):
    """Return the largest difference between what a request made and the reference's pixels."""
    wanted = np.asarray(wanted)
    pictures = np.stack([picture.numpy() for picture in req.outputs]).reshape(wanted.shape)
    return float(np.abs(pictures - wanted).max())


def parts_of(pipeline, recipe):
    """Return the encoders of a pipeline of ours."""
    return [part_of(pipeline, name) for name in recipe.text_encoders], pipeline.modules().get("image_encoder")


def part_of(pipeline, name):
    component, _, rest = name.partition(".")
    module = pipeline.get_module(component)
    return attrgetter(rest)(module) if rest else module


def run_reference(pipe, recipe, reqs, case):
    """Return what the reference makes of the requests: called once with lists, or once a request."""
    if not recipe.one_at_a_time:
        return call_reference(pipe, recipe, reqs, case)
    each = [call_reference(pipe, recipe, [req], case) for req in reqs]
    expected = each[0]
    expected.noise = torch.cat([one.noise for one in each])
    expected.steps = [torch.cat(latents) for latents in zip(*(one.steps for one in each), strict=True)]
    expected.pixels = [one.pixels[0] for one in each]
    for key, states in (row for one in each[1:] for row in one.made.items()):
        expected.made[key] += states
    return expected


def call_reference(pipe, recipe, reqs, case):
    expected = Expected()
    expected.steps = []
    params = reqs[0].params
    names = {name: recipe.to_diffusers.get(name, name) for name in params.options()}
    fields = {names[name]: value for name, value in params.set_fields().items() if name not in NOT_PASSED}
    if not recipe.one_at_a_time:
        fields["prompt"] = [req.params.prompt for req in reqs]
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
        if fields.get(name) is not None and not recipe.one_at_a_time:
            fields[name] = [fields[name]] * len(reqs)
    for name, value in fields.items():
        fields[name] = list(value) if isinstance(value, tuple) else value
    if params.image is not None:
        fields["image"] = list(params.image) if len(params.image) > 1 else params.image[0]
    prepare_latents = pipe.prepare_latents

    def recording(*args, **kwargs):
        returned = prepare_latents(*args, **kwargs)
        expected.noise = (returned[0] if isinstance(returned, tuple) else returned).clone()
        return returned

    def record(_pipe, _step, _t, tensors):
        expected.steps.append(tensors["latents"].clone())
        return tensors

    pipe.prepare_latents = recording
    try:
        text_encoders = [attrgetter(name)(pipe) for name in recipe.text_encoders]
        with encodings((text_encoders, getattr(pipe, "image_encoder", None))) as expected.made:
            expected.pixels = pipe(
                **fields,
                generator=[torch.Generator().manual_seed(req.params.seed) for req in reqs],
                callback_on_step_end=record,
                return_dict=False,
            )[0]
    finally:
        del pipe.prepare_latents
    expected.sigmas, expected.timesteps = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps
    return expected


def run_ours(pipeline, req):
    """Drive a request to its end; return its initial noise, and its latents after each step."""
    noise: torch.Tensor | None = None
    steps: list[torch.Tensor] = []
    with Execution(pipeline, req) as execution:
        while execution.advance():
            if noise is None and req.latents is not None:
                noise = req.latents
            if req.step_index > len(steps):
                steps.append(req.latents)
    return noise, steps


@contextmanager
def encodings(encoders):
    """Record what encoders of text and of images make: hidden states by the encoder and the row that it was given.

    A row of text is its token ids, and its states are [S, C], both without what is masked; a picture is its number, and
    its states are those that models are given.
    """
    text_encoders, image_encoder = encoders
    made: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)

    def text_hook(index):
        def record(_module, args, kwargs, output):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            seen = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
            for row, kept, states in zip(ids, seen.bool(), output["last_hidden_state"], strict=True):
                made[index, *row[kept].tolist()].append(states[kept].clone())

        return record

    def image_hook(_module, _args, _kwargs, output):
        for row, states in enumerate(output.hidden_states[-2]):
            made["image", row].append(states.clone())

    # Inside a language model with a head, which one side may have and the other not.
    bodies = [getattr(encoder, "base_model", encoder) for encoder in text_encoders]
    handles = [body.register_forward_hook(text_hook(i), with_kwargs=True) for i, body in enumerate(bodies)]
    if image_encoder is not None:
        handles.append(image_encoder.register_forward_hook(image_hook, with_kwargs=True))
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def difference_of_states(ours, theirs):
    """Return how far ours are from the nearest of theirs with the same key, in parts of the largest value above 1.

    One row may be encoded several times, and in another context: a token of a caption, after other tokens.
    """

    def difference(left, right):
        return float((left - right).abs().max()) / max(1.0, float(right.abs().max()))

    return max(
        min(difference(mine, other) for other in theirs[key] if other.shape == mine.shape)
        for key, states in ours.items()
        for mine in states
    )


def test_outputs_can_be_had_again_alone(recipe, models):
    pipeline = models.ours(recipe)
    fields = {**recipe.cases[0].fields, "seed": 40}
    together = [run_alone(pipeline, req) for req in requests(pipeline, {**fields, "n": 3})]
    alone = [run_alone(pipeline, requests(pipeline, {**fields, "seed": 40 + index})[0]) for index in range(3)]
    assert all(torch.equal(left, right) for left, right in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[1])


def run_alone(pipeline, req):
    with Execution(pipeline, req) as execution:
        while execution.advance():
            pass
    return req.outputs[0]


@pytest.mark.parametrize("component", ["vae", "text_encoder", "transformer"])
def test_a_component_may_have_its_own_dtype(recipe, models, component):
    folder, fields = models.folder(recipe), {**recipe.cases[1].fields, "n": 1}
    args = ServerArgs(str(folder), device="cpu", dtype="bfloat16", component_dtypes={component: "float32"})
    mixed = load_pipeline(args)
    dtypes = {
        name: list(module.parameters())[-1].dtype  # the first may be one that is always float32
        for name, module in mixed.modules().items()
    }
    prescribed = mixed.config.precisions.keys() & dtypes.keys()
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {component} | prescribed
    (req,), (exact,) = requests(mixed, fields), requests(models.ours(recipe), fields)
    difference = (run_alone(mixed, req) - run_alone(models.ours(recipe), exact)).abs().mean()
    assert 0 < float(difference) < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_the_reference(recipe, models, dtype):
    case = recipe.cases[0]
    folder = models.folder(recipe)
    ours = load_pipeline(ServerArgs(str(folder), device="cpu", dtype=dtype))
    reference = recipe.reference(folder, dtype=getattr(torch, dtype))
    reqs = requests(ours, case.fields)
    expected = run_reference(reference, recipe, reqs, case)
    noise, steps = run_ours(ours, reqs[0])
    assert torch.equal(noise, expected.noise[:1])
    scale = float(expected.steps[-1].float().abs().max())
    difference = float((steps[-1].float() - expected.steps[-1].float()).abs().max())
    assert difference <= 0.03 * scale
