"""What a request costs, known before it runs. Imports no torch.

The unit is a latent token's way through the model. Where the model's architecture is known, attention counts: a token
looks at all others, so that at `Architecture.balance` tokens each costs twice what it would cost alone.
"""

from __future__ import annotations

from safelight.core.byte_sizes import shown_size
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.core.stage_memory import largest_need

OF_A_STEP = ("size", "num_frames")
"""What makes one step large."""


def step_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return what one denoising step of one output costs, over all branches."""
    tokens = params.num_sequence_tokens(schema)
    looked_at = 0.0 if schema.architecture is None else tokens / schema.architecture.balance
    return round(tokens * (1 + looked_at)) * params.num_branches()


def request_cost(params: SamplingParams, schema: ModelSchema) -> int:
    """Return the steps of a whole request, resolved, times what each costs, over all outputs."""
    assert params.n is not None
    return max(1, params.num_steps()) * step_cost(params, schema) * params.n * len(params.prompts())


def memory_excess(params: SamplingParams, schema: ModelSchema) -> str:
    """Say why a request can never fit into the memory beside the model, whatever else runs; nothing where it may."""
    if not schema.device_bytes:
        return ""
    left, tokens = f"and the model leaves {shown_size(schema.device_bytes)}", params.num_sequence_tokens(schema)
    needed, stage = largest_need(schema.stage_memory, params.num_pixels(schema), tokens)
    if needed > schema.device_bytes:
        return f"{stage} needs about {shown_size(needed, up=True)} of memory, {left}"
    if tokens * schema.token_bytes > schema.device_bytes:
        return f"a step needs more than {shown_size(tokens * schema.token_bytes)} of memory, {left}"
    return ""


def largest(params: SamplingParams, schema: ModelSchema, names: tuple[str, ...]) -> tuple[str, object]:
    """Return the field, of these, that is largest beside the model's own default, and its value."""
    defaults = schema.defaults_for(params.set_fields())
    height, width = params.output_size(schema.size_multiple)
    usual_pixels = (defaults.get("height") or height) * (defaults.get("width") or width)
    shares = {
        "size": (height * width / usual_pixels, f"{width}x{height}"),
        "num_inference_steps": (params.num_steps() / (defaults.get("num_inference_steps") or 1), params.num_steps()),
        "num_frames": ((params.num_frames or 1) / (defaults.get("num_frames") or 1), params.num_frames),
        "n": (params.n or 1, params.n),
    }
    name = max(names, key=lambda name: shares[name][0])
    return name, shares[name][1]
