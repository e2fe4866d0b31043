"""What is declared wrongly of batch dimensions is named, in either direction."""

from __future__ import annotations

import pytest

from safelight.checking.stacking import stacking_rows
from safelight.testing.models import requests
from tests.recipes.flux import CAT, FLUX

FIELDS = {"prompt": CAT, "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 24}
GUIDED = {**FIELDS, "negative_prompt": "blurry", "true_cfg_scale": 2.0}


def notes(pipeline, fields):
    (req,) = requests(pipeline, fields)
    return [(row.what, row.verdict, row.note) for row in stacking_rows(pipeline, req.params, 1e-4)]


@pytest.fixture
def config(tiny_models, monkeypatch):
    """Return a function that sets an attribute of the configuration's class."""
    cls = type(tiny_models.ours(FLUX).config)
    return lambda name, value: monkeypatch.setattr(cls, name, value)


def test_each_branch_is_what_it_is_alone(tiny_models):
    assert notes(tiny_models.ours(FLUX), GUIDED) == [
        ("transformer: cond, stacked with another request", "ok", ""),
        ("transformer: uncond, stacked with another request", "ok", ""),
    ]


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        (set(), "freqs_cis, 120x8, has no batch dimension of 1: either it is named in `shared_kwargs`"),
        ({"freqs_cis", "guidance"}, "guidance has other values there, and is in `shared_kwargs`"),
        ({"freqs_cis", "timestep"}, "timestep has other values there"),
        ({"freqs_cis", "encoder_hidden_states"}, "encoder_hidden_states has other values there"),
        ({"freqs_cis", "pooled_projections"}, "pooled_projections has other values there"),
    ],
)
def test_a_name_that_is_missing_or_too_many_is_named(tiny_models, config, shared, said):
    config("shared_kwargs", frozenset(shared))
    ((_, verdict, note),) = notes(tiny_models.ours(FLUX), FIELDS)
    assert verdict == "DIVERGES" and note.startswith(said)


def test_a_signature_that_differs_by_request_is_named(tiny_models, config):
    """Nothing of such a model would ever be stacked."""
    config("call_signature", lambda self, branch, batch: (batch.params.seed,))
    ((_, verdict, note),) = notes(tiny_models.ours(FLUX), FIELDS)
    assert verdict == "DIVERGES" and "call_signature is another" in note
