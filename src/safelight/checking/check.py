"""A whole comparison: both models loaded, one request through each, then inside what diverges first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from safelight.checking.calls import compare_branches, pairs_of, rows_inside
from safelight.checking.ours import run_ours
from safelight.checking.record import OUTPUT, Recorded, RecordedCall, Recorder, block_names
from safelight.checking.reference import run_reference
from safelight.checking.report import DIVERGES, NOT_COMPARED, OK, Report, Row, compare_recorded
from safelight.checking.stacking import stacking_rows
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.preparation import prepare

ENCODERS = ("text_encoder", "image_encoder")
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2
PICTURE_SIZE = (160, 96)


def check_model(server_args: ServerArgs, fields: Mapping[str, Any], tolerance: float | None = None) -> Report:
    """Load a model twice, here and with the diffusers package, and compare.

    Args:
        server_args: the model, device and dtype; its backend is not looked at.
        fields: sampling parameters; a picture is made where the model needs one and none is given.
        tolerance: as in `compare`.

    Raises:
        ModelError: if it has no family here, if diffusers has no such pipeline, or if it cannot be loaded.
        UsageError: for what the model does not take.

    """
    theirs = open_repository(
        server_args.model,
        server_args.revision,
        backend="diffusers",
        weights=False,
        pipeline=server_args.pipeline,
        component=server_args.component,
    )
    ours = load_pipeline(dataclasses.replace(server_args, backend="native"))
    dtypes = {**ours.config.precisions, **server_args.component_dtypes}
    dtypes = {name: dtype for name, dtype in dtypes.items() if name in theirs.component_names()}
    reference_args = dataclasses.replace(server_args, backend="diffusers", component_dtypes=dtypes)
    return compare(ours, load_pipeline(reference_args).get_module("pipeline"), fields, tolerance)


def compare(
    ours: ComposedPipeline, reference: Any, fields: Mapping[str, Any], tolerance: float | None = None
) -> Report:
    """Run one request through both models, and compare what they make, in the order in which ours is made.

    Token ids, schedule and noise must be equal. The rest may differ by the tolerance, in units of the reference's
    largest value where that is above 1. Inside a model call forms may differ as long as its output agrees. Last, calls
    of two requests are made as one, and compared with each alone.

    Args:
        ours: the model here.
        reference: the pipeline of the diffusers package.
        fields: sampling parameters.
        tolerance: 1e-4 for float32 and 3e-2 for halves if None.

    Raises:
        UsageError: for what the model does not take.

    """
    transformer_dtype = ours.server_args.component_dtype("transformer", ours.config.precisions.get("transformer"))
    by_dtype = TOLERANCE if transformer_dtype is torch.float32 else HALF_TOLERANCE
    limit = by_dtype if tolerance is None else tolerance
    params, _ = prepare(ours.schema, {**inputs(ours.schema, fields), "n": 1, "output_type": "np"})
    if isinstance(params.prompt, tuple):
        raise InvalidParameterError("prompt", params.prompt, "one text, here")
    shared = [name for name in ours.modules() if isinstance(reference.components.get(name), nn.Module)]
    encoders = [name for name in shared if name.startswith(ENCODERS)]
    models = {name: ours.get_module(name) for name in shared if name not in (*encoders, "vae")}
    made = run_ours(ours, params, {name: ours.get_module(name) for name in encoders}, models)
    blocks = {name: block_names(model) for name, model in models.items()}
    expected = run_reference(reference, params, {name: reference.components[name] for name in encoders}, blocks)
    comparison = Comparison(made, expected, limit)
    rows = [*comparison.rows(models, reference), *stacking_rows(ours, params, limit)]
    return Report(ours.schema.model, ours.schema.pipeline_name, tuple(rows))


def inputs(schema: ModelSchema, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked of both: the fields given, and pictures where they are needed."""
    if "image" in fields or not schema.num_input_images[0]:
        return dict(fields)
    return {**fields, "image": [random_picture(index) for index in range(schema.num_input_images[0])]}


def random_picture(seed: int) -> Image.Image:
    """Return a picture with large and small random patches."""
    generator, (width, height) = torch.Generator().manual_seed(seed), PICTURE_SIZE
    layers = [torch.rand(1, 3, height // size, width // size, generator=generator) for size in (32, 4)]
    pixels = sum(nn.functional.interpolate(layer, (height, width), mode="bilinear") for layer in layers)
    assert isinstance(pixels, torch.Tensor)
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 127.5).to(torch.uint8).numpy())


def excused(row: Row) -> Row:
    """Return the row of a later step's call, whose arguments are rounded otherwise already, where its latents agree."""
    if row.verdict != DIVERGES:
        return row
    return dataclasses.replace(row, verdict=NOT_COMPARED, note="of a later step: its latents agree")


class Comparison:
    """What one request made, here and in the reference.

    Args:
        ours: as we made it.
        theirs: as the reference did.
        tolerance: as in `compare`.

    """

    def __init__(self, ours: Recorder, theirs: Recorder, tolerance: float) -> None:
        self.ours = ours
        self.theirs = theirs
        self.tolerance = tolerance
        self.pairs = pairs_of(ours.calls, theirs.calls)

    def rows(self, models: Mapping[str, nn.Module], reference: Any) -> list[Row]:
        """Return a row for everything that we made, and one for what only the reference did.

        Where a call diverges first, what lies inside it is there too.
        """
        rows: list[Row] = []
        diverged = False
        for name, made in self.ours.entries.items():
            if isinstance(made, RecordedCall) and made is self.ours.calls[0]:
                rows.append(compare_branches(self.ours.calls, self.theirs.calls))
            found = self._rows_of(name, made)
            first = next((index for index, row in enumerate(found) if row.verdict == DIVERGES), None)
            if isinstance(made, RecordedCall) and first is not None and not diverged:
                found[first:first] = self._inside(made, found[first], models, reference)
            diverged = diverged or first is not None
            rows += found
        names = {row.what for row in rows}
        extra = [name for name, made in self.theirs.entries.items() if isinstance(made, Recorded) and name not in names]
        return [*(Row(name, "", None, None, NOT_COMPARED, "only in the reference") for name in extra), *rows]

    def _rows_of(self, name: str, made: Recorded | RecordedCall) -> list[Row]:
        if isinstance(made, RecordedCall):
            rows = self.pairs[id(made)].rows(self.tolerance)
            return [excused(row) for row in rows] if made.step and self._agree_after(made.step) else rows
        expected = self.theirs.entries.get(name)
        assert not isinstance(expected, RecordedCall)
        return [compare_recorded(name, made, expected, self.tolerance)]

    def _agree_after(self, step: int) -> bool:
        """Say whether the latents after a step, from 0, are the reference's."""
        name = f"latents after step {step + 1}"
        made = self.ours.entries.get(name)
        return isinstance(made, Recorded) and self._rows_of(name, made)[0].verdict == OK

    def _inside(self, call: RecordedCall, row: Row, models: Mapping[str, nn.Module], reference: Any) -> list[Row]:
        entry = next(entry for entry in call.entries if call.title(entry) == row.what)
        pair = self.pairs[id(call)]
        if pair.theirs is None or (entry != OUTPUT and not entry.startswith(".")):
            return []
        root, their_root = models[call.component], reference.components[call.component]
        known = {call.title(entry) for entry in call.entries}
        inside = rows_inside(pair, entry, root, their_root, self.tolerance)
        return [row for row in inside if row.what not in known]
