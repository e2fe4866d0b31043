"""Bounds of what a component's JSON may say, by the kind of component: numbers, and names of other files.

What a network asks for is bounded where it is built (`bounds.py`), by the bytes of its weights. The rest is here:
tables and pictures that code makes from a few numbers. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from safelight.errors import ModelIndexError, shown
from safelight.loading.expressions import MAX_ADDED, MAX_DEPTH, MAX_ID, check_vocabulary


@dataclass(frozen=True)
class Bounds:
    """What the numbers of a kind of configuration may be.

    Attributes:
        most: a whole number, or its negative; in any place that is not named.
        named: by a setting's name, where that is another.
        free: settings that no table, picture or loop is made of.
        infinite: settings that may be infinity.
        fractions: whether `most` is of other numbers too.

    """

    most: int
    named: Mapping[str, int] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    infinite: frozenset[str] = frozenset()
    fractions: bool = False


MAX_SIDE, MAX_PIXELS, MAX_LEAST_PIXELS = 4096, 1 << 25, 1 << 22
"""Of a picture as an encoder's processor makes it: a side, an area, and an area that small pictures are enlarged to."""

NETWORK = Bounds(1 << 24, free=frozenset({"rope_theta", "seed"}))
SOLVER = Bounds(1_000_000, infinite=frozenset({"lambda_min_clipped", "s_tmax"}))
TOKENIZER = Bounds(1_000_000, {"extra_ids": 10_000}, frozenset({"model_max_length"}))
SIDES = Bounds(
    MAX_SIDE,
    {
        "merge_size": 16,
        "patch_size": 128,
        "temporal_patch_size": 16,
        "min_pixels": MAX_LEAST_PIXELS,
        "max_pixels": MAX_PIXELS,
        "image_seq_length": 1 << 20,
        "image_seq_len": 1 << 20,
    },
    fractions=True,
)
PIXELS = Bounds(
    SIDES.most, {**SIDES.named, "shortest_edge": MAX_LEAST_PIXELS, "longest_edge": MAX_PIXELS}, fractions=True
)
"""Of processors whose edges are areas."""
OF_PIXELS = ("Qwen", "Glm")
"""What the names of their classes begin with."""
SOUND = Bounds(1 << 21)
"""Of what makes features of sound, by samples and hertz: classes named `...FeatureExtractor`, but for an older name."""
OF_PICTURES = "CLIPFeatureExtractor"

MAX_LENGTH, NO_LENGTH = 1 << 21, 10**18
"""Tokens of a text that a tokenizer cuts to or fills up to; from the second on it has no such length."""

ELSEWHERE: Mapping[str, frozenset[str]] = {
    "config.json": frozenset({"configuration_files", "transformers_weights"}),
    "preprocessor_config.json": frozenset(),
    "processor_config.json": frozenset(),
    "tokenizer_config.json": frozenset(
        {
            *("added_tokens_file", "fast_tokenizer_files", "gguf_file", "init_inputs", "merges", "merges_file"),
            *("sentencepiece_model_file", "spm_file", "tokenizer_file", "tokenizer_object", "vocab", "vocab_file"),
        }
    ),
}
"""By file, settings that have had a library read another one: what is checked must be what is read."""


def bounds_of(name: str, class_name: str) -> Bounds | None:
    """Return the bounds of a configuration by its file's name and its component's class; None for other files."""
    processor = PIXELS if class_name.startswith(OF_PIXELS) else SIDES
    if class_name.endswith("FeatureExtractor") and class_name != OF_PICTURES:
        processor = SOUND
    return {
        "config.json": NETWORK,
        "scheduler_config.json": SOLVER,
        "tokenizer_config.json": TOKENIZER,
        "special_tokens_map.json": TOKENIZER,
        "preprocessor_config.json": processor,
        "processor_config.json": processor,
        "video_preprocessor_config.json": PIXELS,
    }.get(name)


def check_settings(config: Mapping[str, Any], name: str, where: str, class_name: str = "") -> None:
    """Refuse a configuration that is out of all proportion, or sends a library to another file.

    Args:
        config: what the file says.
        name: the file's.
        where: the file, for messages.
        class_name: what the index names the component's class.

    Raises:
        ModelIndexError: naming the first setting.

    """
    for setting in sorted(ELSEWHERE.get(name, frozenset()) & config.keys()):
        if config[setting]:
            raise ModelIndexError(f"{where}: {setting} is refused; a component's files have their usual names")
    bounds = bounds_of(name, class_name)
    if bounds is not None:
        for setting, number in numbers(config):
            check_number(setting, number, bounds, where)
    added = config.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        check_vocabulary(added, f"{where}: added_tokens_decoder", MAX_ADDED)
        for number in added:
            if not (number.isdecimal() and len(number) < 8 and int(number) <= MAX_ID):
                raise ModelIndexError(
                    f"{where}: added_tokens_decoder: got {shown(number)}; it takes at most {MAX_ID:,}"
                )
    if "model_max_length" in config:
        _check_length(config["model_max_length"], where)


def numbers(value: Any, name: str = "", depth: int = MAX_DEPTH) -> Iterator[tuple[str, float]]:
    """Yield every number in a JSON value, with the name of the setting that it belongs to.

    A value that its whole setting is called by a size of (`{"size": {"height": 4}}`) has the inner name.
    """
    if not depth:
        raise ModelIndexError(f"{shown(name)}: nested in more than {MAX_DEPTH} lists and objects")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from numbers(entry, name if key.isdecimal() else key, depth - 1)
    elif isinstance(value, list):
        for entry in value:
            yield from numbers(entry, name, depth - 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def check_number(name: str, value: float, bounds: Bounds, where: str) -> None:
    """Refuse a number that is out of all proportion.

    Raises:
        ModelIndexError: naming it.

    """
    if name in bounds.free and value == value:  # nothing but NaN is not itself
        return
    if isinstance(value, float) and not math.isfinite(value):
        if name not in bounds.infinite or math.isnan(value):
            raise ModelIndexError(f"{where}: {name}: got {value}; it takes a finite number")
        return
    most = bounds.named.get(name, 1 << 20 if name.endswith("_token_id") else bounds.most)
    if abs(value) > most and (bounds.fractions or isinstance(value, int)):
        raise ModelIndexError(f"{where}: {name}: got {shown(value)}; it takes at most {most:,}")


def _check_length(value: Any, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (1 <= value <= MAX_LENGTH or value >= NO_LENGTH):
        takes = f"a number of tokens, at most {MAX_LENGTH:,}"
        raise ModelIndexError(f"{where}: model_max_length: got {shown(value)}; it takes {takes}")
