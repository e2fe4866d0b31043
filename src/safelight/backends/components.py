"""The components of the diffusers package's pipelines: which there are, and of which classes they may be."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.errors import ModelIndexError

RENAMED: Mapping[tuple[str, str], str] = {("transformers", "CLIPFeatureExtractor"): "CLIPImageProcessor"}
"""Classes that older writers' indexes name, and that Diffusers knows by another name."""

VIDEO_PROCESSOR = "video_processor"
"""A processor's part for videos: those of transformers need torchvision."""


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


def needed_components(class_name: str) -> set[str]:
    """Return the names of the components that a pipeline of the package cannot be built without."""
    import diffusers

    cls = getattr(diffusers, class_name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    empty = inspect.Parameter.empty
    return {each.name for each in parameters if each.default is empty and each.name not in cls._optional_components}


def expected_classes(class_name: str, component: str) -> tuple[type, ...]:
    """Return the classes of which a pipeline of the package has a component that is a network."""
    import diffusers

    types = getattr(diffusers, class_name)._get_signature_types().get(component, ())
    return tuple(each for each in types if isinstance(each, type) and issubclass(each, nn.Module))


def missing_packages(cls: Any) -> list[str]:
    """Return the packages that are not installed, and that the diffusers package has a stand-in for a class without."""
    from diffusers.utils.import_utils import DummyObject

    needed = cls._backends if isinstance(cls, DummyObject) else ()
    return [name for name in needed if importlib.util.find_spec(name) is None]


def check_component(folder: Path, name: str, entry: Any) -> type:
    """Return the class of a component of the index.

    Args:
        folder: the component's.
        name: its name.
        entry: what the index says of it.

    Raises:
        ModelIndexError: unless it is `[library, class]` of diffusers, its pipelines, or transformers.

    """
    well_formed = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    cls = component_class(*entry) if well_formed else None
    if cls is None or Path(name).name != name or (folder / f"{entry[0]}.py").exists():
        raise ModelIndexError(
            f"model_index.json: {name}: {entry!r} is refused; only classes of diffusers and transformers are loaded, "
            "and never code from a repository"
        )
    return cls


def is_taken_apart(cls: Any) -> bool:
    """Say whether a class is a processor of videos beside images, which needs a package that is not there."""
    import transformers
    from transformers.utils.import_utils import is_torchvision_available

    return (
        issubclass(cls, transformers.ProcessorMixin)
        and VIDEO_PROCESSOR in cls.get_attributes()
        and not is_torchvision_available()
    )


def load_component(cls: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """Load one component by itself: local files, safetensors, no code of others.

    Args:
        cls: its class, one that `component_class` returns.
        folder: the component's.
        dtype: of its weights, if it has any.
        variant: of them.

    Raises:
        Exception: whatever the package raises.

    """
    if is_taken_apart(cls):
        return _load_apart(cls, folder)
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(folder, local_files_only=True)
    return cls.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True)


def _load_apart(cls: Any, folder: Path) -> Any:
    """Load a processor's tokenizer and image processor each by itself, and join them without one of videos."""
    settings, _ = cls.get_processor_dict(folder, local_files_only=True)
    parts = [None if name == VIDEO_PROCESSOR else _part(name, folder) for name in cls.get_attributes()]
    return _without_videos(cls).from_args_and_dict(parts, settings)


def _part(name: str, folder: Path) -> Any:
    """Load a processor's part, by the class that the part's own configuration names.

    Raises:
        ModelIndexError: if that is none of transformers: an automatic choice would ask for code of the repository.

    """
    import transformers

    if name == "tokenizer":
        named = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    else:
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
        named = settings.get("image_processor_type")
    plain = str(named).removesuffix("Fast")
    cls: Any = component_class("transformers", str(named)) or component_class("transformers", plain)
    if cls is None:
        takes = "only classes of transformers are loaded"
        raise ModelIndexError(f"{folder.name}: {name}: class {named!r} is refused; {takes}")
    return cls.from_pretrained(folder, local_files_only=True)


@functools.cache
def _without_videos(cls: Any) -> Any:
    """Return a processor's class that takes none for the part of videos."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else cls.check_argument_for_proper_class(self, name, argument)

    namespace = {"check_argument_for_proper_class": check, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), namespace)
