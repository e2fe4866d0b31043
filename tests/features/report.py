"""The page `docs/features.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.features.table import FEATURES, PAIRS, WORKING_PAIRS, Pair

NOT_RUN = "not run"


def cell(pair: Pair, worst: Mapping[str, float], notes: dict[str, int]) -> str:
    """Return a pair's text."""
    if pair.refusal is not None:
        text = f"`{pair.refusal.setting}`: {pair.refusal.reason}"
        return f"refused ({notes.setdefault(text, len(notes) + 1)})"
    if str(pair) in worst:
        difference = worst[str(pair)]
        return f"{difference:.1e}" if difference else "equal"
    return "needs CUDA" if pair.needs_cuda else NOT_RUN


def matrix(worst: Mapping[str, float], notes: dict[str, int]) -> list[str]:
    """Return the table; it is filled below its diagonal, and the diagonal is each feature alone."""
    cells = {pair.names: cell(pair, worst, notes) for pair in PAIRS}
    lines = ["| | " + " | ".join(feature.name for feature in FEATURES) + " |", "|" + " --- |" * (len(FEATURES) + 1)]
    for index, row in enumerate(FEATURES):
        texts = [cells.get(frozenset((row.name, column.name)), "one setting") for column in FEATURES[: index + 1]]
        lines.append("| " + " | ".join([row.name, *texts, *[""] * (len(FEATURES) - index - 1)]) + " |")
    return lines


def made_by(measured: Mapping[tuple[str, str], float], families: Sequence[str]) -> str:
    """Return how the page was made, and which of what can run here has not run."""
    asked = [(str(pair), name) for pair in WORKING_PAIRS for name in families if not pair.needs_cuda]
    missing = [each for each in asked if each not in measured]
    short = f" but for {len(missing)} of {len(asked)} runs of a pair in a family" if missing else ""
    return f"Made by `make features`{short}; do not edit."


def markdown(measured: Mapping[tuple[str, str], float], families: Sequence[str]) -> str:
    """Return the page.

    Args:
        measured: the largest difference of each pair in each family, by their names.
        families: the pipelines that are asked.

    """
    import torch

    notes: dict[str, int] = {}
    worst: dict[str, float] = {}
    for (pair, _), difference in measured.items():
        worst[pair] = max(difference, worst.get(pair, 0.0))
    table = matrix(worst, notes)
    head = [
        "# Features, two by two",
        "",
        made_by(measured, families),
        "",
        "Tiny random checkpoints of one pipeline of each family, two requests with guidance, one of them of two",
        "outputs, float32. Each cell is the largest difference of pixels in [0, 1] from everything off, over all",
        "outputs and families; the diagonal is a feature alone. Each pair is within the sum of its bounds, or",
        "refused at start, or the tests fail. Offload runs on a second memory that stands for a device's, and",
        "copies as late as it may; layouts on two or four ranks of the CPU over gloo.",
        f"torch {torch.__version__.split('+')[0]}.",
        "",
        *table,
        "",
        "Refused at start, with these settings and reasons:",
        "",
        *(f"{number}. {text}" for text, number in notes.items()),
        "",
        "| feature | settings | bound | reason |",
        "| --- | --- | --- | --- |",
    ]
    for feature in FEATURES:
        settings = " ".join(f"`{name}={value}`" for name, value in feature.settings.items())
        bound = f"{feature.bound:.0e}" if feature.bound else "equal"
        head.append(f"| {feature.name} | {settings or DRIVEN[feature.driver]} | {bound} | {feature.reason} |")
    return "\n".join(head) + "\n"


DRIVEN = {"interleaved": "several requests at a time", "stacked": '`batching="throughput"`', "alone": ""}
