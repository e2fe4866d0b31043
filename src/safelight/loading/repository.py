"""A model repository in Diffusers layout: `model_index.json`, and one folder a component. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.core.registry import PipelineEntry, get_pipeline, pipelines
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError, ModelIndexError, ModelNotFoundError, shown
from safelight.loading import hub
from safelight.loading.classes import LIBRARY_CLASSES
from safelight.loading.elsewhere import CONFIG_NAMES, Change, Elsewhere, existing, found_elsewhere
from safelight.loading.files import check_inside, read_json
from safelight.loading.gate import check_folder, check_model, is_class
from safelight.loading.hub import DEFAULTS_NAME, INDEX_NAME
from safelight.loading.variants import choose_variant, own_variant

SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "shapes"
CONNECTED = "prior_"
"""What the names of the components begin with that the package has from a second repository."""
LOOP = "transformer"
"""What the names of the denoising loop's components begin with."""


@dataclass(frozen=True)
class Repository:
    """A model repository on this machine.

    Attributes:
        name: what it was asked for by.
        path: its folder.
        index: `model_index.json`.
        pipeline: the pipeline that its `_class_name` names.
        notes: what users of it should know.
        variant: of the weights that are read, where a component has it; None is the plain files.
        elsewhere: folders of components that are not the model's own, by name.

    """

    name: str
    path: Path
    index: Mapping[str, Any]
    pipeline: PipelineEntry
    notes: tuple[str, ...] = ()
    variant: str | None = None
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def folder(self, component: str) -> Path:
        """Return a component's folder."""
        return self.elsewhere.get(component, self.path / component)

    def component_names(self) -> tuple[str, ...]:
        """Return the components that its pipeline loads: those that the class names, of the package's those there."""
        if self.pipeline.backend == "native":
            return self.pipeline.pipeline_cls().component_names()
        from safelight.backends import components

        return components.component_names(self.pipeline.pipeline_name, self.index)

    def component_files(self, component: str) -> list[str]:
        """Return the names of the files in a component's folder."""
        folder = self.folder(component)
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def component_variant(self, component: str) -> str | None:
        """Return the variant of a component's weights that is read: the repository's, if the component has it."""
        return own_variant(self.component_files(component), self.variant)

    def component_class_name(self, component: str) -> str | None:
        """Return the class name that the index gives a component; None where it is null or absent.

        Raises:
            ModelIndexError: if the entry is not `[library, class]` of a known library.

        """
        entry = self.index.get(component)
        if entry is None or entry == [None, None]:
            return None
        if not is_class(entry):
            raise ModelIndexError(f"{INDEX_NAME}: {component}: got {entry!r}; it takes [library, class]")
        library, class_name = entry
        if library not in ("diffusers", "transformers"):
            raise ModelIndexError(
                f"{INDEX_NAME}: {component}: class {class_name!r} of {library!r} is refused; "
                "only classes of diffusers and transformers are loaded, and never code from a repository"
            )
        return str(class_name)

    def component_config(self, component: str) -> dict[str, Any]:
        """Return a component's JSON configuration.

        Raises:
            ModelIndexError: if there is none, or it is no JSON object.

        """
        for name in CONFIG_NAMES:
            path = self.folder(component) / name
            if path.is_file():
                return read_json(path)
        raise ModelIndexError(f"{self.name}: component {component} has no {' or '.join(CONFIG_NAMES)}")

    def sampling_defaults(self) -> dict[str, Any]:
        """Return the default sampling values that the repository states for itself, checked."""
        path = self.path / DEFAULTS_NAME
        if not os.path.lexists(path):
            return {}
        check_inside(self.path, path)
        options = self.pipeline.sampling_param_cls().options()
        stated = read_json(path)
        unknown = sorted(stated.keys() - options.keys())
        if unknown:
            raise ModelIndexError(
                f"{self.name}: {DEFAULTS_NAME} has {', '.join(unknown)}, which this pipeline does not"
            )
        try:
            return {name: options[name].check(name, value) for name, value in stated.items()}
        except InvalidParameterError as error:
            raise ModelIndexError(f"{self.name}: {DEFAULTS_NAME}: {error}") from error


def open_repository(
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    *,
    backend: str = "auto",
    weights: bool = True,
    variant: str | None = None,
    pipeline: str | None = None,
    component: Mapping[str, str] | None = None,
) -> Repository:
    """Find a model: the shipped one (None), a folder, or a Hub id, which is downloaded.

    Args:
        model: a folder, or a Hub id such as `owner/name`, optionally with `@revision`.
        revision: branch, tag or commit of a Hub id.
        backend: `auto` (a family of ours, or else the diffusers package), `native` or `diffusers`.
        weights: whether weights are needed; without, only JSON and tokenizers are downloaded.
        variant: of the weights, such as `fp16`; None is the plain files, or the only variant that there is.
        pipeline: class name of the pipeline, in the place of the index's.
        component: components from elsewhere, by name: folders, or Hub ids.

    Raises:
        ModelError: if there is no such model, it may not be read, or its index is not one that can be run.
        InvalidParameterError: for a revision of a folder, or one beside that in the name; a variant that is not there;
            a pipeline that there is not; a component that it does not take, or lacks.

    """
    added: dict[str, Elsewhere] = {}
    for added_name, where in (component or {}).items():
        added |= found_elsewhere(added_name, where, weights, variant)
    change = Change(pipeline, added)
    name = str(model) if model is not None else str(SHIPPED_MODEL)
    path = existing(name)
    if path is not None:
        if revision is not None:
            raise InvalidParameterError("revision", revision, "nothing here: a folder has no revisions")
        known_as = name if model is not None else "the shipped model"
        return _checked(_read(known_as, path, backend, change), weights, variant)
    if not hub.is_repo_id(name):
        raise ModelNotFoundError(f"model: {shown(name)}: no such folder, and not a Hub id (owner/name)")
    repo_id, _, tagged = name.partition("@")
    if tagged and revision not in (None, tagged):
        raise InvalidParameterError("revision", revision, f"nothing beside the {tagged!r} in the model's name")
    revision = tagged or revision
    index_path = hub.download_index(repo_id, revision)
    found = _read(name, index_path.parent, backend, change)
    components = [each for each in found.component_names() if each not in found.elsewhere]
    path = hub.download_components(repo_id, revision, index_path.parent, components, weights, variant)
    return _checked(_read(name, path, backend, change), weights, variant)


def open_for(server_args: ServerArgs) -> Repository:
    """Find the model that an engine is set to, with its weights.

    Raises:
        ModelError: as `open_repository`.
        InvalidParameterError: likewise.

    """
    names = ("backend", "variant", "pipeline", "component")
    return open_repository(server_args.model, server_args.revision, **{name: vars(server_args)[name] for name in names})


def _checked(repository: Repository, weights: bool, variant: str | None) -> Repository:
    """Return a repository whose files may be opened, with the variant that is read where weights are.

    What a pipeline's class names is asked for with the weights alone: it needs torch. All else that may be read of a
    model, its index names.
    """
    named = {name for name, entry in repository.index.items() if isinstance(entry, list)}
    read = repository.component_names() if weights else ()
    check_model(repository.path, repository.index, sorted({*named, *read} - repository.elsewhere.keys()))
    for component, folder in repository.elsewhere.items():
        check_folder(folder, repository.index[component][1])
    if not weights:
        return repository
    files = {name: repository.component_files(name) for name in read}
    return dataclasses.replace(repository, variant=choose_variant(files, variant))


def _takes_latents_alone(path: Path, elsewhere: Mapping[str, Path]) -> bool:
    """Say whether a model's UNet is given latents and nothing beside: one that is does what it was made for alone."""
    configs = []
    for name in ("unet", "vae"):
        folder = elsewhere.get(name, path / name)
        if not (folder / "config.json").is_file():
            return True
        check_inside(folder if name in elsewhere else path, folder / "config.json")
        configs.append(read_json(folder / "config.json"))
    unet, vae = configs
    return bool(unet.get("in_channels", 4) == vae.get("latent_channels", 4))


def _check_change(repository: Repository, change: Change) -> None:
    """Refuse a component that the pipeline does not take, and one of the package's without one that it needs."""
    is_native = repository.pipeline.backend == "native"
    if is_native and not change.added:
        return
    takes, class_name = repository.component_names(), repository.pipeline.pipeline_name
    for component, found in change.added.items():
        if component not in takes and found.is_asked_for:
            raise InvalidParameterError("component", component, f"components of {class_name}: {', '.join(takes)}")
    if not is_native:
        _check_package(class_name, takes, change)


def _check_package(class_name: str, takes: Sequence[str], change: Change) -> None:
    """Refuse a component of another class than the package's pipeline expects, and one that is not there."""
    from safelight.backends import components

    for component, found in change.added.items():
        expected = components.expected_classes(class_name, component)
        cls = components.component_class(*found.entry)
        if expected and cls is not None and not issubclass(cls, expected):
            wanted = " or ".join(each.__name__ for each in expected)
            raise InvalidParameterError(f"component[{component!r}]", found.entry[1], f"{wanted} for {class_name}")
    lacking = sorted(components.needed_components(class_name) - {*takes})
    if lacking:
        added = f"component adds {'it' if len(lacking) == 1 else 'them'}, as {lacking[0]}=PATH_OR_ID"
        if all(name.startswith(CONNECTED) for name in lacking):
            added = f"component adds them, as {CONNECTED}*=PATH_OR_ID"
        text = f"{class_name} needs {' and '.join(lacking)}, which the model has not; {added}"
        if change.pipeline is not None:
            raise InvalidParameterError("pipeline", class_name, f"what the model has the components for: {text}")
        raise ModelIndexError(f"{INDEX_NAME}: {text}")


def _read(name: str, path: Path, backend: str, change: Change) -> Repository:
    if not (path / INDEX_NAME).is_file():
        raise ModelIndexError(f"{name}: no {INDEX_NAME} there; a model is a folder in Diffusers layout")
    check_inside(path, path / INDEX_NAME)
    index = read_json(path / INDEX_NAME)
    index |= {component: list(found.entry) for component, found in change.added.items()}
    class_name = change.pipeline or index.get("_class_name")
    if not isinstance(class_name, str):
        raise ModelIndexError(f"{INDEX_NAME}: _class_name: got {class_name!r}; it takes a pipeline's class name")
    folders = {component: found.folder for component, found in change.added.items()}
    entry = _pipeline_entry(class_name, backend, index, change.pipeline is not None)
    if entry.backend != "native" and not _takes_latents_alone(path, folders):
        entry = _pipeline_entry(class_name, backend, {}, is_set=True)
    notes: tuple[str, ...] = ()
    if backend == "auto":
        notes = (f"{class_name} has no family here: it runs through the {entry.backend} package",)
        if entry.backend == "native":
            entry, notes = _with_fallback(entry, index)
    repository = Repository(name, path, index, entry, notes, elsewhere=folders)
    _check_change(repository, change)
    return repository


def _pipeline_entry(class_name: str, backend: str, index: Mapping[str, Any], is_set: bool) -> PipelineEntry:
    """Return the pipeline of a class name: ours, or that of the diffusers package, as `backend` asks."""
    if backend != "diffusers" and class_name in pipelines():
        return get_pipeline(class_name)
    from safelight.backends import components, diffusers

    found = backend != "native" and diffusers.has_pipeline(class_name)
    if is_set and not found:
        raise InvalidParameterError("pipeline", class_name, "a class that `safelight models --all` lists")
    if backend != "diffusers" and not found:
        return get_pipeline(class_name)  # which names those that there are
    names = components.component_names(class_name, index) if diffusers.has_pipeline(class_name) else ()
    return diffusers.pipeline_entry(class_name, names)  # which refuses a class that there is not


def _with_fallback(entry: PipelineEntry, index: Mapping[str, Any]) -> tuple[PipelineEntry, tuple[str, ...]]:
    """Return the family's pipeline, or the package's where a component's class is the libraries' and not the family's.

    The transformer is not looked at: it is what the family is for. Of a class that is neither, the family's pipeline
    says so by name.
    """
    named = {name: part for name, part in index.items() if is_class(part) and not name.startswith(LOOP)}
    foreign = {name: part for name, part in named.items() if part[1] not in LIBRARY_CLASSES}
    if not foreign:
        return entry, ()
    pipeline_cls = entry.pipeline_cls()  # imports torch, and so after what can be known without
    own, used = pipeline_cls.component_classes, pipeline_cls.component_names()
    foreign = {name: part for name, part in foreign.items() if name in used and part[1] not in own}
    if not foreign:
        return entry, ()
    from safelight.backends import components, diffusers

    loadable = all(components.component_class(*part) is not None for part in foreign.values())
    if not (loadable and diffusers.has_pipeline(entry.pipeline_name)):
        return entry, ()
    listed = " and ".join(f"{name} {class_name}" for name, (_, class_name) in foreign.items())
    note = f"{entry.pipeline_name} has no {listed} here: it runs through the diffusers package"
    names = components.component_names(entry.pipeline_name, index)
    return diffusers.pipeline_entry(entry.pipeline_name, names), (note,)
