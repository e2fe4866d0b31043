"""Makes docs/solvers.md: which names models of each kind of noise take.

`python -m tests.solver_table --write docs/solvers.md`
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import diffusers

from safelight.core.solver import solver_choices
from safelight.core.solver_names import SOLVERS, SPACINGS

KINDS = {
    "noise by betas": diffusers.EulerDiscreteScheduler,
    "EDM": diffusers.EDMEulerScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}
NEEDS_SCIPY = {"lms"}
"""Whether it is installed is not the page's matter."""
HEAD = """# Solvers by name

`scheduler="unipc_karras"` (a field of a request, a part of HTTP's JSON, `--scheduler` of `safelight generate`) has a
request stepped by another solver than the model's own: built from the model's configuration, as Diffusers'
`X.from_config(pipe.scheduler.config, ...)` does. The table is made by `python -m tests.solver_table`: what a model of
each kind takes, if its configuration and its pipeline ask for nothing special. `+` is the name alone; suffixes follow.

What one loaded model takes is in its schema (`/v1/models/{{id}}/schema`). A solver is refused if it
does not know a setting that the model was trained with (zero terminal SNR, a dynamic or terminal shift, a learned
variance, continuous timesteps), lacks a method, argument or list of steps that the pipeline's code uses, cannot be
built, or fails in a trial of four steps. Names with `_beta` need scipy, and so does `lms`: they are left out where it
is not.

| name | calls of the model in n steps | {kinds} |
|---|---|{rule}|
"""


def calls(name: str) -> str:
    """Return how many calls n steps are."""
    named = SOLVERS[name]
    return f"{named.calls_a_step}n - 1" if named.calls_a_step > 1 else "n + 1" if named.more_calls else "n"


def table() -> str:
    """Return the page. Suffixes that need scipy are those of names that have another."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = {kind: solver_choices(own(), lambda _own, _solver: frozenset())[0] for kind, own in KINDS.items()}
    for name in SOLVERS:
        cells = ["needs scipy"] * len(KINDS) if name in NEEDS_SCIPY else [cell(name, found) for found in taken.values()]
        rows.append(f"| `{name}` | {calls(name)} | {' | '.join(cells)} |")
    head = HEAD.format(kinds=" | ".join(KINDS), rule="---|" * (len(KINDS) - 1) + "---")
    return head + "\n".join(rows) + "\n"


def cell(name: str, found: dict[str, tuple[str, ...]]) -> str:
    """Return what a kind takes of a name."""
    suffixes = [suffix for suffix in SPACINGS if f"{name}_{suffix}" in found and suffix != "beta"]
    spaced = [*suffixes, "beta"] if suffixes else []
    return " ".join(["+", *(f"`_{suffix}`" for suffix in spaced)]) if name in found else ""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, required=True)
    parser.parse_args().write.write_text(table())


if __name__ == "__main__":
    main()
