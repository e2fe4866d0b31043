"""What a request costs, known before it runs. Imports no torch."""

from __future__ import annotations

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema


def step_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return the latent tokens that one denoising step of one output takes through the model, over all branches."""
    return params.num_latent_tokens(schema) * params.num_branches()


def request_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return steps x latent tokens x branches x outputs of a whole request, resolved."""
    assert params.n is not None
    return max(1, params.num_steps()) * step_cost(params, schema) * params.n * len(params.prompts())
