"""A whole comparison: both models loaded, one request through each, then inside what diverges first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from safelight.checking.ours import OurRun, run_ours
from safelight.checking.record import Kind, Recorder, block_names, leaf_names, recording_modules
from safelight.checking.reference import ReferenceRun, run_reference
from safelight.checking.report import DIVERGES, NOT_COMPARED, OK, Report, Row, compare_recorded
from safelight.core.pipeline import ComposedPipeline
from safelight.core.schema import ModelSchema
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.layers.fusable import FusableLayer
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
    theirs = open_repository(server_args.model, server_args.revision, backend="diffusers", weights=False)
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
    largest value where that is above 1. Inside a model call forms may differ as long as its output agrees.

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
    names = [
        name
        for name in ours.component_names()
        if name.startswith(ENCODERS) and isinstance(reference.components.get(name), nn.Module)
    ]
    our_run = run_ours(ours, params, {name: ours.get_module(name) for name in names})
    component = our_run.call.component
    kept = block_names(ours.get_module(component))
    their_run = run_reference(reference, params, {name: reference.components[name] for name in names}, component, kept)
    rows = compare_all(our_run.recorder, their_run.recorder, limit, f"{component}: output")
    rows = with_inside(rows, ours, reference, our_run, their_run, limit)
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


def compare_all(ours: Recorder, theirs: Recorder, tolerance: float, output: str) -> list[Row]:
    """Return a row for everything that we made, and one for what only the reference did.

    Where the model's output agrees, what is inside has another form, or none that matters.
    """
    rows = {
        name: compare_recorded(name, made, theirs.entries.get(name), tolerance) for name, made in ours.entries.items()
    }
    if rows[output].verdict == OK:
        for name, row in rows.items():
            if ours.entries[name].kind is Kind.INNER and row.verdict == DIVERGES:
                note = "another form: the output agrees"
                rows[name] = dataclasses.replace(row, verdict=NOT_COMPARED, note=note)
    extra = [name for name, made in theirs.entries.items() if name not in rows and made.kind is not Kind.INNER]
    missing = [Row(name, "", None, None, NOT_COMPARED, "only in the reference") for name in extra]
    return [*missing, *rows.values()]


def with_inside(
    rows: list[Row], ours: ComposedPipeline, reference: Any, our_run: OurRun, their_run: ReferenceRun, tolerance: float
) -> list[Row]:
    """Put before the first row that diverges, if it is a module, the rows of the layers inside it.

    They are not kept from the start, because there are too many: the first model call is made once more for them.
    """
    component = our_run.call.component
    first = next((index for index, row in enumerate(rows) if row.verdict == DIVERGES), None)
    if first is None or not rows[first].what.startswith(f"{component}."):
        return rows
    root, their_root = ours.get_module(component), getattr(reference, component)
    below = leaf_names(root, rows[first].what.removeprefix(f"{component}."))
    # A layer of ours that does more than the reference's of its name is no match for it.
    names = [name for name in below if not isinstance(root.get_submodule(name), FusableLayer)]
    mine, theirs = Recorder(), Recorder()
    with torch.inference_mode():
        with recording_modules(mine, root, component, names):
            root(**our_run.call.kwargs, **our_run.call.shared_kwargs)
        with recording_modules(theirs, their_root, component, names):
            their_root(**their_run.calls[0])
    known = {row.what for row in rows}
    inside = [
        compare_recorded(name, made, theirs.entries.get(name), tolerance)
        for name, made in mine.entries.items()
        if name in theirs.entries and name not in known
    ]
    return [*rows[:first], *inside, *rows[first:]]
