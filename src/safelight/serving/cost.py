"""The ceiling on what one request may cost."""

from __future__ import annotations

from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError
from safelight.runtime.cost import request_cost


def check_cost(params: SamplingParams, schema: ModelSchema, ceiling: float) -> None:
    """Refuse a request that asks for more work than the ceiling; nothing is cut to fit.

    Raises:
        InvalidParameterError: naming what is largest beside the model's own default.

    """
    cost = request_cost(params, schema)
    if cost <= ceiling:
        return
    defaults = schema.defaults
    height, width = params.output_size(schema)
    usual_pixels = defaults.get("height", height) * defaults.get("width", width)
    shares = {
        "size": (height * width / usual_pixels, f"{width}x{height}"),
        "num_inference_steps": (params.num_steps() / (defaults.get("num_inference_steps") or 1), params.num_steps()),
        "num_frames": ((params.num_frames or 1) / (defaults.get("num_frames") or 1), params.num_frames),
        "n": (params.n or 1, params.n),
    }
    name = max(shares, key=lambda name: shares[name][0])
    takes = f"less: steps x latent tokens x branches x outputs are {cost:,}, and at most {ceiling:,.0f} are done"
    raise InvalidParameterError(name, shares[name][1], takes)
