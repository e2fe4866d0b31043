"""The table of the parity suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

HEADINGS = ("pipeline", "case", "token ids", "sigmas", "noise", "latents", "pixels")


@dataclass(frozen=True)
class ParityRow:
    """One case's largest absolute differences; ids, sigmas and noise are equal or the test fails."""

    pipeline: str
    case: str
    token_ids: str
    sigmas: str
    noise: str
    latents: float
    pixels: float


def cells(row: ParityRow) -> list[str]:
    return [f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in astuple(row)]


def table(rows: Sequence[ParityRow]) -> str:
    """Return the rows for a terminal."""
    lines = [list(HEADINGS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(rows: Iterable[ParityRow]) -> str:
    """Return the rows as the page `docs/parity.md`."""
    import diffusers
    import torch
    import transformers

    head = [
        "# Parity with Diffusers",
        "",
        "Made by `make parity`; do not edit. Tiny random checkpoints, every parameter shaken, CPU, float32; the same",
        "prompts and seeds through Diffusers and through Safelight. Token ids, sigmas, timesteps and initial noise are",
        "equal, or the test fails. Latents are compared after every step, pixels in [0, 1]; both may differ by 1e-4.",
        "",
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + " --- |" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"
