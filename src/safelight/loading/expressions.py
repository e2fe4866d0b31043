"""What a tokenizer's files may have it do to a text: no expression that backtracks, no text that grows.

Imports no torch.

A tokenizer's expressions run over every prompt, in a library that cannot be interrupted. Those of the tokenizers that
models have are a dozen, and are known here; another one is taken if it is so simple that its time is at most the square
of a text's length, which a server bounds: without groups, and with one repetition without end in each alternative.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from safelight.errors import ModelIndexError, shown

_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SUFFIXES = "'s|'t|'re|'ve|'m|'ll|'d"
_LOW, _HIGH = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTER = r"[^\r\n\p{L}\p{N}]?"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
KNOWN = frozenset(
    {
        rf"<\|startoftext\|>|<\|endoftext\|>|{_SUFFIXES}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",  # CLIP
        rf"{_SUFFIXES}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",  # GPT-2
        rf"{_WORDS}|{_LETTER}\p{{L}}+|\p{{N}}|{_OTHER}|{_SPACES}",  # Qwen 2 and 3
        rf"{_WORDS}|{_LETTER}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",  # Qwen 3.5
        rf"{_WORDS}|{_LETTER}\p{{L}}+|\p{{N}}{{1,3}}|{_OTHER}|{_SPACES}",  # GPT-4, Llama 3, GLM
        rf"{_LETTER}{_HIGH}*{_LOW}+{_WORDS}?|{_LETTER}{_HIGH}+{_LOW}*{_WORDS}?|\p{{N}}{{1,3}}|{_SLASHED}|{_SPACES}",
        rf"{_LETTER}{_HIGH}*{_LOW}+|{_LETTER}{_HIGH}+{_LOW}*|\p{{N}}|{_SLASHED}|{_SPACES}",  # Mistral's Tekken
    }
)
"""Of published tokenizers: of those with a group, or with two repetitions, the alternatives are disjoint."""
MAX_EXPRESSION = 200
"""Characters of another one."""
MAX_BOUNDED = 3
"""Repetitions with an end, in an alternative of another one."""

MAX_TOKENS, MAX_TOKEN = 1_000_000, 512
"""Of a vocabulary: how many, and of how many characters."""
MAX_ADDED = 20_000
"""Of tokens beside it."""
MAX_ID = 2_000_000
"""A token's number."""
MAX_GROWTH = 8
"""Times that normalisation may make a text longer; an Arabic ligature is 18 letters, but no text is of those alone."""
MAX_ADDITION = 64
"""Characters that are put before a text, or tokens around it."""
MAX_CHARSMAP, MAX_MAPPED = 1 << 20, 64
"""Bytes of a table of characters, and of what it maps one to."""
MAX_DEPTH = 32
"""Of lists and objects in each other."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer(config: Mapping[str, Any], where: str) -> None:
    """Refuse a `tokenizer.json` that could take more time or memory than a text is worth.

    Raises:
        ModelIndexError: naming what it has.

    """
    for part in PARTS:
        check_part(config.get(part), f"{where}: {part}")
    added, model = config.get("added_tokens") or [], config.get("model") or {}
    if not isinstance(added, list) or not isinstance(model, Mapping):
        raise ModelIndexError(f"{where}: added_tokens or model is no such thing")
    check_vocabulary({str(number): token for number, token in enumerate(added)}, f"{where}: added_tokens", MAX_ADDED)
    check_vocabulary(model, f"{where}: model", MAX_TOKENS)
    if model.get("dropout"):
        raise ModelIndexError(f"{where}: model: dropout: got {shown(model['dropout'])}; a text's tokens are not drawn")
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # of tokens with their scores
        vocabulary = {str(each[0]): 0 for each in vocabulary if isinstance(each, list) and each}
    if not isinstance(vocabulary, Mapping):
        raise ModelIndexError(f"{where}: vocab is no vocabulary")
    check_vocabulary(vocabulary, f"{where}: vocab")


def check_vocabulary(tokens: Mapping[str, Any], where: str, most: int = MAX_TOKENS) -> None:
    """Refuse tokens by their number, their lengths, and the numbers that they have.

    Args:
        tokens: a JSON object; strings in its values, and in objects there, are looked at as its keys are.
        where: the file, for messages.
        most: how many.

    Raises:
        ModelIndexError: naming the first.

    """
    if len(tokens) > most:
        raise ModelIndexError(f"{where}: {len(tokens):,} tokens; it takes at most {most:,}")
    for token, value in tokens.items():
        inner = value.values() if isinstance(value, Mapping) and "content" in value else (value,)
        for text in (token, *(entry for entry in inner if isinstance(entry, str))):
            if len(text) > MAX_TOKEN:
                raise ModelIndexError(f"{where}: a token of {len(text):,} characters; at most {MAX_TOKEN}")
        for number in inner:
            if type(number) is int and not 0 <= number <= MAX_ID:
                raise ModelIndexError(
                    f"{where}: {shown(token)}: got {shown(number)}; a token's number is at most {MAX_ID:,}"
                )


def check_part(part: Any, where: str) -> None:
    """Refuse a step of a tokenizer, as its library writes it, or one of the steps that it is made of.

    Raises:
        ModelIndexError: naming what it has.

    """
    growth = 1.0
    for step in _steps(part):
        pattern = step.get("pattern")
        pattern = pattern if isinstance(pattern, Mapping) else {"String": pattern}
        if isinstance(pattern.get("Regex"), str):
            check_expression(pattern["Regex"], where)
        if "content" in step and "pattern" in step:
            growth *= _growth(pattern, str(step["content"]))
        for name in ("prepend", "replacement", "prefix", "suffix", "cls", "sep", "single", "pair", "tokens", "ids"):
            _check_short(step.get(name), f"{where}: {name}")
        if isinstance(step.get("precompiled_charsmap"), str):
            check_charsmap(step["precompiled_charsmap"], where)
    if growth > MAX_GROWTH:
        raise ModelIndexError(f"{where}: it makes a text {growth:,.0f} times longer; at most {MAX_GROWTH}")


def _steps(value: Any, depth: int = MAX_DEPTH) -> Iterator[Mapping[str, Any]]:
    """Yield every object in a JSON value."""
    if not depth:
        raise ModelIndexError(f"a tokenizer's steps are nested in more than {MAX_DEPTH} lists and objects")
    if isinstance(value, Mapping):
        yield value
        for entry in value.values():
            yield from _steps(entry, depth - 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _steps(entry, depth - 1)


def _growth(pattern: Mapping[str, Any], content: str) -> float:
    """Return how many times longer a replacement may make a text."""
    literal = pattern.get("String")
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return len(content) + 1.0 if len(content) > 1 else 1.0  # what is replaced may be nothing: before each character


def _check_short(value: Any, where: str) -> None:
    if isinstance(value, str | list) and len(value) > MAX_ADDITION:
        raise ModelIndexError(f"{where}: {len(value):,} characters or tokens are added; at most {MAX_ADDITION}")


def check_charsmap(encoded: str, where: str) -> None:
    """Refuse SentencePiece's table of characters if it maps one to a long text.

    Raises:
        ModelIndexError: if it does, or is no such table.

    """
    try:
        data = base64.b64decode(encoded[: 2 * MAX_CHARSMAP], validate=True)
        (size,) = struct.unpack("<I", data[:4])
    except (binascii.Error, struct.error, ValueError) as error:
        raise ModelIndexError(f"{where}: precompiled_charsmap is no such table") from error
    longest = max(map(len, data[4 + size :].split(b"\0")))
    if len(data) > MAX_CHARSMAP or size % 4 or size + 4 > len(data) or longest > MAX_MAPPED:
        raise ModelIndexError(
            f"{where}: precompiled_charsmap is no such table, or maps a character to {longest:,} bytes; "
            f"at most {MAX_MAPPED}"
        )


def check_expression(expression: str, where: str) -> None:
    """Refuse a regular expression that is neither known nor simple.

    Raises:
        ModelIndexError: with the expression.

    """
    if expression not in KNOWN and not is_simple(expression):
        raise ModelIndexError(
            f"{where}: the expression {shown(expression)} is refused; it is none that published tokenizers have, "
            "and another has no groups, and one repetition in each alternative"
        )


_CLASS = re.compile(r"\[\^?\]?(?:[^\\\[\]&]|\\[pP]\{\w+\}|\\[^pP])*\]")
_ATOM = re.compile(r"\\[pP]\{\^?\w+\}|\\[AzZ]|\\[sSdDwWnrt]|\\[^\w]|[^\\\[\](){}*+?|]")
_REPEATED = re.compile(r"([*+]|\{\d{1,4}(?:,\d{0,4})?\}|\?)[?+]?")


def is_simple(expression: str) -> bool:
    """Say whether an expression takes at most the square of a text's length, by its form alone.

    It is made of characters and classes of them, one after the other, each with at most one repetition; one of an
    alternative's repetitions may be without end, or have up to thousands, and a few more are of `?`.
    """
    place, endless, bounded = 0, 0, 0
    if len(expression) > MAX_EXPRESSION:
        return False
    while place < len(expression):
        if expression[place] == "|":
            place, endless, bounded = place + 1, 0, 0
            continue
        atom = _CLASS.match(expression, place) or _ATOM.match(expression, place)
        if atom is None:
            return False
        place = atom.end()
        repeated = _REPEATED.match(expression, place)
        if repeated is not None:
            place = repeated.end()
            bounded, endless = (bounded + 1, endless) if repeated[1] == "?" else (bounded, endless + 1)
        if endless > 1 or bounded > MAX_BOUNDED:
            return False
    return True
