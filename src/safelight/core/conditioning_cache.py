"""What encoders made of texts and images, kept for the next request that asks for the same."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from PIL import Image

from safelight.core.params import SamplingParams
from safelight.core.trees import Tree, leaves, map_tree, with_leaves


class ConditioningCache:
    """Embeddings and image latents by everything that they were made from, bounded in bytes; the oldest used go first.

    A key holds the texts themselves and the digests of images; the weights are told apart by `weights`. What is kept is
    shared by requests: nothing may write into it.

    Args:
        max_bytes: of all tensors together; 0 keeps nothing.
        weights: digest of each component's weights, by its name; another digest is another key.
        home: where they are kept; None leaves them where they were made. What is kept elsewhere is copied back.

    Attributes:
        num_hits, num_misses: how often something was found, or was not.
        num_bytes: of what is kept.

    """

    def __init__(
        self, max_bytes: int, weights: Mapping[str, str] | None = None, *, home: torch.device | None = None
    ) -> None:
        self.max_bytes = max_bytes
        self._home = home
        self.weights = {} if weights is None else weights
        self.num_hits = self.num_misses = self.num_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Tree, list[torch.device], Any]] = OrderedDict()
        self._digests: dict[int, tuple[weakref.ref[Image.Image], bytes]] = {}

    def get(self, component: str, *inputs: Hashable) -> tuple[Tree, Any] | None:
        """Return what a component made of these inputs, and the note beside it; None if it is not here.

        Args:
            component: its name in the pipeline.
            inputs: all that it depends on.

        """
        key = (component, self.weights.get(component), *inputs)
        found = self._kept.get(key)
        if found is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._kept.move_to_end(key)
        kept, devices, note = found
        return _on(kept, devices), note

    def put(self, made: Tree, note: Any, component: str, *inputs: Hashable) -> tuple[Tree, Any]:
        """Keep what a component made of these inputs, where there is room; return both as they are kept.

        Args:
            made: a tree of tensors; of a view of a larger one a copy is kept.
            note: what else is remembered with it.
            component: its name in the pipeline.
            inputs: all that it depends on.

        """
        made = map_tree(made, lambda each: each if each.untyped_storage().nbytes() == each.nbytes else each.clone())
        num_bytes = _num_bytes(made)
        if num_bytes > self.max_bytes:
            return made, note
        key = (component, self.weights.get(component), *inputs)
        if key in self._kept:  # two requests made it at the same time
            kept, devices, note = self._kept[key]
            return _on(kept, devices), note
        home = self._home
        kept = made if home is None else map_tree(made, lambda each: each.to(home))
        self._kept[key] = kept, [each.device for each in leaves(made)], note
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (oldest, _, _) = self._kept.popitem(last=False)
            self.num_bytes -= _num_bytes(oldest)
        return made, note

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.num_bytes = 0

    def images_of(self, params: SamplingParams) -> Hashable:
        """Return what a request's images are prepared by: the images' digests and every parameter that could matter."""
        if not self.max_bytes:
            return ()
        return tuple((name, self._plain(value)) for name, value in params.image_fields().items())

    def _plain(self, value: Any) -> Hashable:
        """Return a parameter's value as a part of a key."""
        if isinstance(value, Image.Image):
            return self._digest(value)
        return tuple(map(self._plain, value)) if isinstance(value, list | tuple) else value

    def _digest(self, image: Image.Image) -> bytes:
        """Return the digest of an image's pixels, made once an image however many stages and outputs ask."""
        known = self._digests.get(id(image))
        if known is not None and known[0]() is image:
            return known[1]
        hashed = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=32)
        hashed.update(image.tobytes())
        number, digest = id(image), hashed.digest()
        self._digests[number] = weakref.ref(image, lambda _: self._digests.pop(number, None)), digest
        return digest


def _on(kept: Tree, devices: list[torch.device]) -> Tree:
    return with_leaves(kept, [each.to(device) for each, device in zip(leaves(kept), devices, strict=True)])


def _num_bytes(made: Tree) -> int:
    return sum(each.nbytes for each in leaves(made))
