"""Writes a pipeline's tiny checkpoint: what its constructor takes, made small, and what its row of data says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import transformers

from safelight.testing.recipes import references_own_warnings
from tests.backends.recipes.encoders import encoder, processor, tokenizer
from tests.backends.recipes.networks import network

CLASS = "class"
"""In what a component has of its own: the name of its class, where the constructor names several, or a base."""
SHARED = "as"
"""In its place: the component that it is."""


@dataclass(frozen=True)
class Tiny:
    """What a pipeline's class needs beside what its signatures say.

    Attributes:
        name: of the class in the diffusers package.
        own: by parameter of the constructor: a component's own settings, None to leave it out, or a plain value.
        asked: fields of a request beside, or instead of, those that `requests` has for every pipeline.
        other: of the second request, where it must differ otherwise.
        folder: written by other means: a function of (recipe, folder).

    """

    name: str
    own: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> Any:
        """The pipeline's class."""
        return getattr(diffusers, self.name)

    def write(self, folder: Path) -> None:
        """Write the checkpoint into a folder."""
        with references_own_warnings():
            self.cls(**self.components(folder)).save_pretrained(folder)

    def components(self, folder: Path) -> dict[str, Any]:
        """Return what the constructor is given; tokenizers leave their files in `folder` on the way."""
        parameters = inspect.signature(self.cls.__init__).parameters
        types = self.cls._get_signature_types()
        optional = {name for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
        wanted = [name for name in types if name in self.own or name not in optional]
        made: dict[str, Any] = {}
        for name in sorted(wanted, key=lambda name: "tokenizer" not in name):  # encoders know their tokens
            made[name] = self._component(name, types[name], made, folder, seed=1 + list(types).index(name))
        return made

    def _component(self, name: str, types: tuple[Any, ...], made: dict[str, Any], folder: Path, seed: int) -> Any:
        own = self.own.get(name, {})
        if not isinstance(own, dict):
            return own
        own = dict(own)
        if SHARED in own:
            return copy.deepcopy(made[own[SHARED]])
        cls = class_named(own.pop(CLASS)) if CLASS in own else types[0]
        if issubclass(cls, diffusers.ModelMixin):
            return network(cls, seed, own)
        if issubclass(cls, diffusers.SchedulerMixin):
            return cls(**own)
        if issubclass(cls, transformers.PreTrainedModel):
            of = name.replace("text_encoder", "tokenizer")
            return encoder(cls, made.get(of) if of != name else None, seed, own)
        if issubclass(cls, transformers.PreTrainedTokenizerBase) or "Tokenizer" in cls.__name__:
            return tokenizer(cls, folder / name)
        if cls.__name__ == "KarrasDiffusionSchedulers":
            return diffusers.EulerDiscreteScheduler(**own)
        return processor(cls)


def class_named(name: str) -> Any:
    """Return a class of diffusers, or of transformers, or of one of the folders of diffusers' pipelines."""
    for module in (diffusers, transformers):
        if name in dir(module):
            return getattr(module, name)
    folder, _, cls = name.partition(".")
    return getattr(getattr(diffusers.pipelines, folder), cls)
