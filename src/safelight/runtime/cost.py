"""What a request costs, known before it runs. Imports no torch.

The unit is a latent token's way through the model. Where the model's architecture is known, attention counts: a token
looks at all others, so that at `Architecture.balance` tokens each costs twice what it would cost alone.
"""

from __future__ import annotations

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema


def step_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return what one denoising step of one output costs, over all branches."""
    tokens = params.num_sequence_tokens(schema)
    looked_at = 0.0 if schema.architecture is None else tokens / schema.architecture.balance
    return round(tokens * (1 + looked_at)) * params.num_branches()


def request_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return the steps of a whole request, resolved, times what each costs, over all outputs."""
    assert params.n is not None
    return max(1, params.num_steps()) * step_cost(params, schema) * params.n * len(params.prompts())
