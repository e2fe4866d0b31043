"""The components of the diffusers package's pipelines: which there are, and of which classes they may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.errors import ModelIndexError

RENAMED: Mapping[tuple[str, str], str] = {("transformers", "CLIPFeatureExtractor"): "CLIPImageProcessor"}
"""Classes that older writers' indexes name, and that Diffusers knows by another name."""


def component_class(library: str, class_name: str) -> type | None:
    """Return a class that Diffusers loads components of, by its entry in the index; None where there is none."""
    import diffusers.guiders
    import diffusers.pipelines
    import transformers

    if library in ("diffusers", "transformers"):
        module = {"diffusers": diffusers, "transformers": transformers}[library]
    elif library in dir(diffusers.pipelines):
        module = getattr(diffusers.pipelines, library)
    else:
        return None
    name = RENAMED.get((library, class_name), class_name)
    found = getattr(module, name, None) if name in dir(module) else None
    loadable = (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        diffusers.guiders.BaseGuidance,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        transformers.ImageProcessingMixin,
        transformers.FeatureExtractionMixin,
    )
    return found if isinstance(found, type) and issubclass(found, loadable) else None


def checkpoint_stem(cls: type) -> str | None:
    """Return the name, without ending, of the checkpoint that a class reads; None for one without weights.

    By its base, not by the library in the index: the packages of single pipelines have classes of both kinds.
    """
    import diffusers
    import transformers

    stems = {transformers.PreTrainedModel: "model", diffusers.ModelMixin: "diffusion_pytorch_model"}
    return next((stem for base, stem in stems.items() if issubclass(cls, base)), None)


def component_names(class_name: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components in an index that the package's pipeline of this name loads: other entries it leaves out.

    A name that is a path is among them, to be refused.
    """
    import diffusers

    cls = getattr(diffusers, class_name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    optional = cls._optional_components
    taken = {each.name for each in parameters if each.default is inspect.Parameter.empty or each.name in optional}
    known = {name: entry for name, entry in index.items() if name in taken or Path(name).name != name}
    return tuple(name for name, entry in known.items() if entry not in (None, [None, None]))


def check_component(folder: Path, name: str, entry: Any) -> type:
    """Return the class of a component of the index.

    Args:
        folder: the repository.
        name: the component's.
        entry: what the index says of it.

    Raises:
        ModelIndexError: unless it is `[library, class]` of diffusers, its pipelines, or transformers.

    """
    well_formed = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    cls = component_class(*entry) if well_formed else None
    if cls is None or Path(name).name != name or (folder / name / f"{entry[0]}.py").exists():
        raise ModelIndexError(
            f"model_index.json: {name}: {entry!r} is refused; only classes of diffusers and transformers are loaded, "
            "and never code from a repository"
        )
    return cls
