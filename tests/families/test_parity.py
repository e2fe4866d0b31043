"""Every pipeline is held to Diffusers: token ids, schedule, noise, every step, pixels, defaults."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from operator import attrgetter

import numpy as np
import pytest
import torch

from safelight import ServerArgs
from safelight.core.executor import Execution
from safelight.core.registry import pipelines
from safelight.loading.loader import load_pipeline
from tests.families.conftest import requests
from tests.families.report import ParityRow
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
    with token_ids([part_of(ours, name) for name in recipe.text_encoders]) as ids:
        for index, req in enumerate(reqs):
            noise, steps = run_ours(ours, req)
            assert torch.equal(noise, expected.noise[index : index + 1]), "the initial noise is another"
            assert req.sigmas == expected.sigmas
            assert torch.equal(req.timesteps, expected.timesteps)
            assert len(steps) == len(expected.steps) == req.num_inference_steps
            for step, wanted in zip(steps, expected.steps, strict=True):
                latent_difference = max(latent_difference, float((step[0] - wanted[index]).abs().max()))
            wanted = np.asarray(expected.pixels[index])
            pictures = np.stack([picture.numpy() for picture in req.outputs]).reshape(wanted.shape)
            pixel_difference = max(pixel_difference, float(np.abs(pictures - wanted).max()))
    assert by_prompt(ids) == by_prompt(expected.ids)
    assert latent_difference <= TOLERANCE and pixel_difference <= TOLERANCE
    assert float(np.std(np.asarray(expected.pixels))) > 0.01, "a flat picture shows nothing"
    parity_rows.append(
        ParityRow(recipe.pipeline_name, case.name, "equal", "equal", "equal", latent_difference, pixel_difference)
    )


def test_defaults_are_those_of_the_signature(recipe, models):
    schema = models.ours(recipe).schema
    signature = inspect.signature(recipe.reference_class().__call__).parameters
    to_ours = {theirs: name for name, theirs in recipe.to_diffusers.items()} | schema.params_cls.aliases
    compared = 0
    for theirs, parameter in signature.items():
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
    arguments = set(inspect.signature(recipe.reference_class().__call__).parameters) - {"self"}
    assert arguments - known == set()


class Expected:
    """What the reference made of a case; the batch comes first."""

    noise: torch.Tensor
    steps: list[torch.Tensor]
    sigmas: list[float]
    timesteps: torch.Tensor
    pixels: np.ndarray
    ids: list[tuple[int, list[int]]]


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
    expected.ids = [row for one in each for row in one.ids]
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
        with token_ids([attrgetter(name)(pipe) for name in recipe.text_encoders]) as expected.ids:
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
def token_ids(encoders):
    """Record (encoder, ids) of every row that passes through the text encoders, without masked padding."""
    seen: list[tuple[int, list[int]]] = []

    def hook(index):
        def record(_module, args, kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            seen_ids = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
            seen.extend((index, row[kept.bool()].tolist()) for row, kept in zip(ids, seen_ids, strict=True))

        return record

    handles = [encoder.register_forward_pre_hook(hook(i), with_kwargs=True) for i, encoder in enumerate(encoders)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def by_prompt(ids):
    """Return what was encoded, whatever the order and however often: outputs of one prompt share their ids."""
    return sorted({(index, tuple(row)) for index, row in ids})


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
