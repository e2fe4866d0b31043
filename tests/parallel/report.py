"""The page `docs/parallel.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEADINGS = ("pipeline", "case", "layout", "compared", "difference", "calls a step", "KiB a step", "KiB by formula")


@dataclass(frozen=True)
class LayoutRow:
    """One case in one layout.

    Attributes:
        pipeline, case: of the recipe.
        layout: as `tp 2 x ring 2`.
        compared: latents, or pixels in [0, 1].
        difference: the largest from one rank.
        num_calls: collectives a step on rank 0; of a decode, where pixels are compared.
        sent: bytes a step that rank 0 sends; of a decode, where pixels are compared.
        predicted: the same by formula.

    """

    pipeline: str
    case: str
    layout: str
    compared: str
    difference: float
    num_calls: float
    sent: float
    predicted: float | None

    def cells(self) -> list[str]:
        """Return the row's texts."""
        predicted = "" if self.predicted is None else f"{self.predicted / 1024:.1f}"
        numbers = [f"{self.difference:.1e}", f"{self.num_calls:g}", f"{self.sent / 1024:.1f}", predicted]
        return [self.pipeline, self.case, self.layout, self.compared, *numbers]


def markdown(rows: Sequence[LayoutRow], formulas: str) -> str:
    """Return the page."""
    import torch

    largest = {what: max((r.difference for r in rows if r.compared == what), default=0.0) for what in WHAT}
    head = [
        "# Many devices: what the layouts give and send",
        "",
        "Made by `make test-parallel`; do not edit. Tiny random checkpoints of every pipeline, float32, ranks on the",
        "CPU over gloo; each request runs on one rank and on all ranks of a layout. What each rank of them makes is",
        "compared with what one makes: latents after all steps, or, with the VAE divided, pixels in [0, 1]; 1e-5 is",
        "allowed.",
        "",
        f"Largest difference of latents: {largest['latents']:.1e}; of pixels: {largest['pixels']:.1e}. "
        f"torch {torch.__version__.split('+')[0]}.",
        "",
        "Calls and bytes are what rank 0 sends, counted where every collective passes, a step; where the VAE is",
        "divided, in the one decode. The formulas, with which counts are equal or the test fails:",
        "",
        formulas,
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(row.cells()) + " |" for row in rows)]) + "\n"


WHAT = ("latents", "pixels")
