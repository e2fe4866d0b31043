"""The ceilings on what one request, and one step of it, may cost."""

from __future__ import annotations

import math

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError
from safelight.runtime.cost import OF_A_STEP, largest, memory_excess, request_cost, step_cost
from safelight.serving.limits import Limits

_OF_A_REQUEST = (*OF_A_STEP, "num_inference_steps", "n")


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
    tokens = params.num_sequence_tokens(schema)
    if tokens > limits.max_tokens:
        takes = f"a step has {tokens:,} tokens, and at most {limits.max_tokens:,} are done at once"
        raise _too_large(params, schema, OF_A_STEP, takes)
    if excess := memory_excess(params, schema):
        raise _too_large(params, schema, OF_A_STEP, excess)
    seconds = step_cost(params, schema) * cost_seconds
    if seconds > limits.unit_seconds:
        takes = f"a step would take about {seconds:,.0f} s here, and may take {limits.unit_seconds:,.0f} s"
        raise _too_large(params, schema, OF_A_STEP, takes)
    cost = request_cost(params, schema)
    if cost > limits.max_cost:
        takes = f"steps x tokens x branches x outputs are {cost:,}, and at most {limits.max_cost:,.0f} are done"
        raise _too_large(params, schema, _OF_A_REQUEST, takes)
    seconds = cost * cost_seconds
    if seconds > max_seconds:
        takes = f"it would take about {seconds:,.1f} s here, and this key may ask for {max_seconds:,.1f} s"
        raise _too_large(params, schema, _OF_A_REQUEST, takes)


def _too_large(
    params: SamplingParams, schema: ModelSchema, names: tuple[str, ...], takes: str
) -> InvalidParameterError:
    name, value = largest(params, schema, names)
    return InvalidParameterError(name, value, f"less: {takes}")
