"""Which pipelines there are: a table that families fill when they are imported, without importing torch."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from safelight import families
from safelight.core.params import SamplingParams
from safelight.errors import ModelIndexError

if TYPE_CHECKING:
    from safelight.core.config import PipelineConfig
    from safelight.core.pipeline import ComposedPipeline

ENTRY_POINT_GROUP = "safelight.families"


@dataclass(frozen=True)
class PipelineEntry:
    """One pipeline class, as its family registered it.

    Attributes:
        model_family: the family's name.
        pipeline_name: `_class_name` in `model_index.json`.
        package: the family's package, whose `pipeline` module has the class in its `EntryClass`.
        hf_model_paths: known repositories, for people; nothing is recognised by them.
        backend: what loads and runs it.

    """

    model_family: str
    pipeline_name: str
    package: str
    hf_model_paths: tuple[str, ...]
    _sampling_param_cls: type[SamplingParams] | str
    _pipeline_config_cls: type[PipelineConfig] | str
    backend: str = "native"

    def sampling_param_cls(self) -> type[SamplingParams]:
        """Return the family's sampling parameters; imports no torch."""
        cls: type[SamplingParams] = resolve_class(self._sampling_param_cls)
        return cls

    def pipeline_config_cls(self) -> type[PipelineConfig]:
        """Return the family's configuration class."""
        cls: type[PipelineConfig] = resolve_class(self._pipeline_config_cls)
        return cls

    def pipeline_cls(self) -> type[ComposedPipeline]:
        """Return the pipeline class, from `EntryClass` of the family's `pipeline` module."""
        module = importlib.import_module(f"{self.package}.pipeline")
        classes: dict[str, type[ComposedPipeline]] = {cls.pipeline_name: cls for cls in module.EntryClass}
        assert self.pipeline_name in classes, f"{module.__name__}.EntryClass has no {self.pipeline_name}"
        return classes[self.pipeline_name]


_entries: dict[str, PipelineEntry] = {}


def register_configs(
    *,
    model_family: str,
    pipeline_name: str,
    hf_model_paths: list[str],
    sampling_param_cls: type[SamplingParams] | str | None = None,
    pipeline_config_cls: type[PipelineConfig] | str | None = None,
    package: str | None = None,
) -> None:
    """Register one pipeline class of a family. Called once for each, when the family's package is imported.

    Args:
        model_family: the family's name.
        pipeline_name: `_class_name` in `model_index.json`.
        hf_model_paths: known repositories; shown by `safelight models`, and used for nothing else.
        sampling_param_cls: the class, or `module:Class`, which is imported when it is asked for; of an `XPipeline` it
            is `XSamplingParams` in the package's module `params`, unless given.
        pipeline_config_cls: likewise; `XPipelineConfig` in the module `config`, unless given.
        package: the family's package, if it is not `safelight.families.<model_family>`.

    """
    registered = _entries.get(pipeline_name)
    package = package or f"{families.__name__}.{model_family}"
    entry = PipelineEntry(
        model_family,
        pipeline_name,
        package,
        tuple(hf_model_paths),
        sampling_param_cls or f"{package}.params:{pipeline_name.removesuffix('Pipeline')}SamplingParams",
        pipeline_config_cls or f"{package}.config:{pipeline_name}Config",
    )
    assert registered is None or registered == entry, f"{pipeline_name} is registered twice"
    _entries[pipeline_name] = entry


@cache
def _discover() -> None:
    """Import every family: the folders of `safelight.families`, then other packages' entry points."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


def pipelines() -> dict[str, PipelineEntry]:
    """Return every registered pipeline by its class name, in alphabetical order."""
    _discover()
    return dict(sorted(_entries.items()))


def get_pipeline(pipeline_name: str) -> PipelineEntry:
    """Return the pipeline registered under a `_class_name`.

    Raises:
        ModelIndexError: where there is none; the message lists those that there are.

    """
    known = pipelines()
    if pipeline_name not in known:
        raise ModelIndexError(
            f"model_index.json: pipeline class {pipeline_name!r} is not supported; known are {', '.join(known)}"
        )
    return known[pipeline_name]


def resolve_class(target: Any) -> Any:
    """Return the class itself, or import it from `module:Class`."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
