"""The ceilings on what one request, and one step of it, may cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError
from safelight.runtime.cost import OF_A_STEP, largest, memory_excess, request_cost, step_cost
from safelight.serving.limits import Limits


def check_cost(
    params: SamplingParams,
    schema: ModelSchema,
    limits: Limits,
    cost_seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> None:
    """Refuse a request that asks for more work than the ceilings, or more memory than there is; nothing is cut to fit.

    Args:
        params: resolved.
        schema: of the loaded model.
        limits: the ceilings.
        cost_seconds: that a unit of cost takes here; 0 where that is not known.
        max_seconds: that all of it may be expected to take.

    Raises:
        InvalidParameterError: naming what is largest beside the model's own default.

    """
    for reason in _too_large_steps(params, schema, limits, cost_seconds):
        name, value = largest(params, schema, OF_A_STEP)
        raise InvalidParameterError(name, value, f"less: {reason}")
    for reason in _too_large(request_cost(params, schema), limits, cost_seconds, max_seconds):
        name, value = largest(params, schema, (*OF_A_STEP, "num_inference_steps", "n"))
        raise InvalidParameterError(name, value, f"less: {reason}")


def _too_large(cost: int, limits: Limits, cost_seconds: float, max_seconds: float) -> Iterator[str]:
    """Yield why a request is too large."""
    if cost > limits.max_cost:
        yield f"steps x tokens x branches x outputs are {cost:,}, and at most {limits.max_cost:,.0f} are done"
    if cost * cost_seconds > max_seconds:
        yield f"it would take about {cost * cost_seconds:,.1f} s here, and this key may ask for {max_seconds:,.1f} s"


def _too_large_steps(params: SamplingParams, schema: ModelSchema, limits: Limits, cost_seconds: float) -> Iterator[str]:
    """Yield why one step of a request, which cannot be interrupted, is too large."""
    tokens = params.num_sequence_tokens(schema)
    if tokens > limits.max_tokens:
        yield f"a step has {tokens:,} tokens, and at most {limits.max_tokens:,} are done at once"
    if excess := memory_excess(params, schema):
        yield excess
    seconds = step_cost(params, schema) * cost_seconds
    if seconds > limits.unit_seconds:
        yield f"a step would take about {seconds:,.0f} s here, and may take {limits.unit_seconds:,.0f} s"
