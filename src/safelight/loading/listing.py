"""Which pipelines of the diffusers package run here, what else their components do, and why others do not run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safelight.backends.components import missing_packages, needed_components
from safelight.backends.diffusers import has_pipeline
from safelight.backends.tasks import params_of
from safelight.errors import ModelIndexError


@dataclass(frozen=True)
class ListedPipeline:
    """A pipeline class of the package.

    Attributes:
        name: of the class.
        why_not: why it does not run here; empty where it does.
        others: pipelines that a request's pictures select over the same components.

    """

    name: str
    why_not: str = ""
    others: tuple[str, ...] = ()

    def about(self) -> str:
        """Say what a list has behind the name."""
        if self.why_not:
            return f": does not run: {self.why_not}"
        return f"; pictures select {', '.join(self.others)}" if self.others else ""


def listed_pipelines() -> Iterator[ListedPipeline]:
    """Yield every pipeline class of the package, in alphabetical order."""
    import diffusers

    for name in dir(diffusers):
        lacking = missing_packages(getattr(diffusers, name)) if name.endswith("Pipeline") else []
        if lacking:
            yield ListedPipeline(name, f"it needs {' and '.join(lacking)}")
        if not has_pipeline(name):
            continue
        try:
            tasks = params_of(name, needed_components(name)).tasks
        except ModelIndexError as error:
            yield ListedPipeline(name, str(error).rpartition("cannot be run: ")[2])
            continue
        yield ListedPipeline(name, others=tuple(task.pipeline_name for task in tasks[1:]))
