"""Our side of a comparison: one request, whose preparation, steps and pixels are kept."""

from __future__ import annotations

import torch

from safelight import ServerArgs
from safelight.checking.ours import run_ours
from safelight.checking.record import Kind, Recorded
from safelight.loading.loader import load_pipeline
from safelight.preparation import prepare

FIELDS = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 24, "seed": 3}


def test_everything_is_kept_in_the_order_in_which_it_is_made(checkpoints):
    pipeline = load_pipeline(ServerArgs(str(checkpoints.folder()), device="cpu"))
    params, _ = prepare(pipeline.schema, {**FIELDS, "output_type": "np", "n": 1})
    model, encoder = pipeline.get_module("transformer"), pipeline.get_module("text_encoder")
    made = run_ours(pipeline, params, {"text_encoder": encoder}, {"transformer": model})
    assert [what for what in made.entries if not what.startswith("text_encoder")] == [
        "timesteps", "sigmas", "initial noise", "transformer", "latents after step 1", "transformer, call 2",
        "latents after step 2", "pixels",
    ]  # fmt: skip
    assert [call.step for call in made.calls] == [0, 1]
    kept = {what: entry for what, entry in made.entries.items() if isinstance(entry, Recorded)}
    assert {kept[what].kind for what in ("timesteps", "sigmas", "initial noise")} == {Kind.EXACT}
    assert kept["pixels"].tensors[0].shape == (1, 32, 48, 3)
    assert not model._forward_hooks and not encoder._forward_hooks


def test_latents_that_are_not_finite_end_it_and_what_was_made_is_kept(checkpoints):
    pipeline = load_pipeline(ServerArgs(str(checkpoints.folder()), device="cpu"))
    model = pipeline.get_module("transformer")
    model.proj_out.bias.data.fill_(float("nan"))
    params, _ = prepare(pipeline.schema, {**FIELDS, "output_type": "np", "n": 1})
    made = run_ours(pipeline, params, {}, {"transformer": model})
    assert "pixels" not in made.entries and "initial noise" in made.entries
    assert not torch.isfinite(made.calls[0].entries[": output"].tensors[0]).all()
