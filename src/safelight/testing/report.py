"""The tables of the parity suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version

HEADINGS = ("pipeline", "case", "token ids", "sigmas", "noise", "hidden states", "latents", "pixels")
OTHERWISE_HEADINGS = ("pipeline", "case", "what the installed Diffusers does", "hidden states", "pixels")


@dataclass(frozen=True)
class ParityRow:
    """One case's largest absolute differences; ids, sigmas and noise are equal or the test fails."""

    pipeline: str
    case: str
    token_ids: str
    sigmas: str
    noise: str
    states: float
    latents: float
    pixels: float


@dataclass(frozen=True)
class OtherwiseRow:
    """What the installed reference does otherwise than the model's authors, and how far that is from ours."""

    pipeline: str
    case: str
    sentence: str
    states: float
    pixels: float


def cells(row: ParityRow | OtherwiseRow) -> list[str]:
    """Return a row's texts."""
    return [f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in astuple(row)]


def table(rows: Sequence[ParityRow | OtherwiseRow], headings: Sequence[str] = HEADINGS) -> str:
    """Return the rows for a terminal."""
    lines = [list(headings), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(rows: Iterable[ParityRow], otherwise: Sequence[OtherwiseRow]) -> str:
    """Return the rows as the page `docs/parity.md`."""
    versions = [f"{name} {version(name).split('+')[0]}" for name in ("diffusers", "transformers", "torch")]
    head = [
        "# Parity with Diffusers",
        "",
        "Made by `make parity`; do not edit. Tiny random checkpoints, every parameter shaken, CPU, float32; the same",
        "prompts and seeds through Diffusers and through Safelight. Token ids, sigmas, timesteps and initial noise are",
        "equal, or the test fails. Hidden states of text and image encoders are compared, in parts of their largest",
        "value if that is above 1; latents after every step; pixels in [0, 1]. Each may differ by 1e-4, while another",
        "prompt, negative prompt, image or seed moves the pixels of every case by at least 1e-2.",
        "",
        f"{', '.join(versions)}.",
        "",
        *markdown_table(rows, HEADINGS),
    ]
    if otherwise:
        head += [
            "",
            "## Where the installed Diffusers errs",
            "",
            "Here the model's authors' code is the reference, and so it is in the table above. This is how far the",
            "installed Diffusers is from it; with its mistake made here too, Safelight's pictures are its pictures.",
            "",
            *markdown_table(otherwise, OTHERWISE_HEADINGS),
        ]
    return "\n".join(head) + "\n"


def markdown_table(rows: Iterable[ParityRow | OtherwiseRow], headings: Sequence[str]) -> list[str]:
    """Return the lines of a table."""
    head = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return [*head, *("| " + " | ".join(cells(row)) + " |" for row in rows)]
