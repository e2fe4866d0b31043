"""Pools of ranks, checkpoints that divide, and the table that the tests write."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import traffic
from safelight.parallel.layout import ParallelLayout
from tests.parallel import checkpoints, work
from tests.parallel.pool import RankPool
from tests.parallel.report import LayoutRow, markdown
from tests.recipes import all_recipes

ROWS = pytest.StashKey[dict[tuple[str, str, str], LayoutRow]]()


def pytest_addoption(parser):
    parser.addoption("--parallel-report", type=Path, help="write the table of the layouts to this file")


def pytest_terminal_summary(terminalreporter, config):
    rows, target = list(config.stash.get(ROWS, {}).values()), config.getoption("--parallel-report", None)
    if rows:
        largest = max(rows, key=lambda row: row.difference)
        terminalreporter.section("layouts: largest difference from one rank")
        terminalreporter.write_line(f"{len(rows)} compared; the largest: {' | '.join(largest.cells())}")
    if rows and target:
        formulas = (traffic.__doc__ or "").partition("\n\n")[2].strip()
        target.write_text(markdown(sorted(rows, key=lambda row: (row.pipeline, row.case)), formulas))


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Return a function: the ranks of a size.

    They end with the module: gloo has a thread for each group that was made, and they wake a hundred times a second.
    """
    made: dict[int, RankPool] = {}

    def pool(size):
        if size not in made or made[size].broken:
            if size in made:
                made[size].close()
            made[size] = RankPool(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return made[size]

    yield pool
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return the checkpoint of a recipe's variant."""

    @cache
    def folder(recipe, variant="default"):
        return checkpoints.build(all_recipes()[recipe], variant, tmp_path_factory.mktemp("checkpoint"))

    return folder


@pytest.fixture(scope="module")
def compare(pools, folders, tmp_path_factory, pytestconfig):
    """Run a case on one rank and in a layout; return the row of the table."""
    rows = pytestconfig.stash.setdefault(ROWS, {})

    @cache
    def expected(recipe, case, variant, output_type):
        return work.alone(str(folders(recipe, variant)), recipe, case, output_type)

    def run(recipe, case, **layout):
        (found,) = [entry for entry in all_recipes()[recipe].cases if entry.name == case]
        output_type = "np" if layout.get("vae") else "latent"
        divided = ParallelLayout(**layout)
        out, folder = tmp_path_factory.mktemp("out"), folders(recipe, found.variant)
        asked = {"folder": str(folder), "recipe": recipe, "case": case, "layout": layout, "out": str(out)}
        told, *_ = pools(divided.num_devices).run("together", **asked, output_type=output_type)
        wanted = expected(recipe, case, found.variant, output_type)
        outputs = [load_file(out / f"rank{rank}.safetensors")["output"] for rank in range(divided.num_devices)]
        assert all(output.shape == wanted.shape for output in outputs)
        difference = max(float((output - wanted).abs().max()) for output in outputs)
        row = make_row(recipe, case, divided, told, difference, folder)
        rows[row.pipeline, row.case, row.layout] = row
        return row

    return run


def make_row(recipe, case, layout, told, difference, folder):
    """Compare what was sent in the steps with the formulas, exactly; return the row of the table."""
    sent, name = {axis: tuple(counts) for axis, counts in told["sent"].items()}, layout.describe()
    decoded = sent.pop("world", (0, 0))
    predicted = predict(layout, told["steps"], folder)
    assert sent == predicted
    if layout.vae:
        calls, num_bytes = decoded
        return LayoutRow(recipe, case, f"{name}, VAE", "pixels", difference, calls, num_bytes, None)
    calls, num_bytes = (sum(counts) / len(told["steps"]) for counts in zip(*sent.values(), (0, 0), strict=True))
    formula = sum(counts[1] for counts in predicted.values()) / len(told["steps"])
    return LayoutRow(recipe, case, name, "latents", difference, calls, num_bytes, formula)


def predict(layout, steps, folder):
    """Return calls and bytes of each axis by formula, over all steps."""
    config = json.loads(next(folder.glob("transformer*/config.json")).read_text())
    shape = traffic.Shape.of(config)
    total: dict[str, tuple[int, float]] = {}
    for calls in steps:
        made = [calls[begin] for begin in range(0, len(calls), layout.cfg)]  # by rank 0
        parts = [traffic.sent_by_forward(shape, forward_of(call, shape, config), layout) for call in made]
        results = [forward_of(call, shape, config).lengths[0] * shape.out_channels for call in calls]
        for part in (*parts, traffic.sent_by_step(results, layout)):
            for axis, (count, num_bytes) in part.items():
                before = total.get(axis, (0, 0))
                total[axis] = (before[0] + count, before[1] + num_bytes)
    return total


def forward_of(call, shape, config):
    """Return the tokens of a call, given the shapes of its arguments."""
    text = call["encoder_hidden_states"][1]
    if shape.is_joint:
        parts = [call[name][1] for name in ("hidden_states", "condition_hidden_states") if name in call]
        return traffic.Forward(tuple(parts), text, groups=len(parts) if config.get("zero_cond_t") else 1)
    images = math.prod(call.get("encoder_hidden_states_image", [0])[:2])
    return traffic.Forward((call["freqs_cis"][0],), text, images, call["timestep"][1])
