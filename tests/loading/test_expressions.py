"""A tokenizer's steps: those of published ones, and what must not run over a prompt."""

from __future__ import annotations

import base64
import json
import struct
import time

import pytest
from tokenizers import Regex, pre_tokenizers

from safelight.errors import ModelIndexError
from safelight.loading.expressions import KNOWN, check_expression, check_part, check_tokenizer, check_vocabulary

SIMPLE = [
    r" {2,}",
    r"\s+",
    r"[\n\r\t]",
    r"\A▁",
    r"\A +| +\z",
    r"^▁+$",
    r"\s{2,}|[\n\r\t]",
    r"[^\s\p{L}]+",
    "'s|'t",
    r"\n",
]
HOSTILE = [
    *(r"(a+)+$", r"(a|a)*b", r"(a|aa)+$", r"(.*)*x", r"(?:x+x+)+y", r"([a-z]+)*\d", r"(?=(a+))\1b", r"(a+)\1+"),
    *(
        r"a*a*b",
        r"\s+\s+$",
        r".*.*=.*",
        r"a?a?a?a?a?aaaaa",
        r"\p{L}*\p{L}*\p{N}",
        r"a{1,9}a{1,9}a{1,9}b",
        r"a{0,999}a+b",
    ),
    *(
        r"[[:alpha:]a&&b]+",
        r"(?<=a)+",
        r"\k<x>",
        r"\G+",
        r"(?>a)",
        r"[a-z]++[a-z]+",
        "x" * 500,
        r"a{10000}",
        "(",
        "a**",
    ),
]
LONG = 8192
INPUTS = [
    "a" * LONG,
    " " * LONG,
    "\n" * LONG,
    " \n" * (LONG // 2),
    "漢" * LONG,
    "1" * LONG,
    "'" * LONG,
    "aA" * (LONG // 2),
]


@pytest.mark.parametrize("expression", [*sorted(KNOWN), *SIMPLE])
def test_what_published_tokenizers_have_is_taken_and_quick(expression):
    """The longest of a server's prompts, of one character that an expression might go over again and again."""
    check_expression(expression, "here")
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    for text in (*INPUTS, *(text + "!" for text in INPUTS)):
        began = time.process_time()
        split.pre_tokenize_str(text)
        assert time.process_time() - began < 2


@pytest.mark.parametrize("expression", HOSTILE)
def test_what_may_backtrack_is_refused(expression):
    with pytest.raises(ModelIndexError, match="the expression"):
        check_expression(expression, "here")


def charsmap(longest, trie=b"\0" * 8):
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + b"ab\0" + b"x" * longest + b"\0").decode()


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 4}
PARTS = [
    ({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}, "the expression"),
    ({"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False}, "the expression"),
    ({"type": "Replace", "pattern": {"String": ""}, "content": "b" * 10**6}, "longer"),
    ({"type": "Sequence", "normalizers": [REPLACE] * 2}, "16 times longer"),
    ({"type": "Prepend", "prepend": "b" * 10**6}, "prepend: 1,000,000 characters"),
    ({"type": "Precompiled", "precompiled_charsmap": charsmap(10**5)}, "to 100,000 bytes"),
    ({"type": "Precompiled", "precompiled_charsmap": "!"}, "no such table"),
    ({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 16).decode()}, "no such table"),
    ({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 10**6}, "single"),
    (
        {"type": "TemplateProcessing", "single": [], "special_tokens": {"x": {"id": "x", "ids": [1] * 9999}}},
        "ids: 9,999",
    ),
]


@pytest.mark.parametrize(("part", "words"), PARTS, ids=lambda value: str(value)[:40])
def test_what_makes_a_text_long_is_refused(part, words):
    for nested in (part, {"type": "Sequence", "normalizers": [{"type": "NFC"}, part]}):
        with pytest.raises(ModelIndexError) as caught:
            check_part(nested, "here")
        assert words in str(caught.value)


def test_what_maps_a_character_to_some_is_taken():
    check_part({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": charsmap(33)}]}, "")
    check_part({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}, "")
    check_part(REPLACE, "")
    check_part(None, "")


FILES = [
    ({"added_tokens": [{"id": 2**40, "content": "x"}]}, "a token's number"),
    ({"added_tokens": [{"id": -1, "content": "x"}]}, "a token's number"),
    ({"added_tokens": [{"id": 1, "content": "x" * 10**6}]}, "a token of 1,000,000 characters"),
    ({"added_tokens": [{}] * 10**5}, "100,000 tokens"),
    ({"model": {"type": "BPE", "dropout": 0.5}}, "are not drawn"),
    ({"model": {"type": "BPE", "end_of_word_suffix": "x" * 10**6}}, "1,000,000 characters"),
    ({"model": {"type": "BPE", "vocab": {"a": 2**50}}}, "a token's number"),
    ({"model": {"type": "Unigram", "vocab": [["x" * 10**6, 0.0]]}}, "1,000,000 characters"),
    ({"added_tokens": 7}, "no such thing"),
    ({"model": {"vocab": 7}}, "no vocabulary"),
    ({"normalizer": json.loads("[" * 500 + "]" * 500)}, "nested in more than 32"),
]


@pytest.mark.parametrize(("config", "words"), FILES, ids=lambda value: str(value)[:40])
def test_tokens_are_bounded(config, words):
    with pytest.raises(ModelIndexError) as caught:
        check_tokenizer(config, "here")
    assert words in str(caught.value)


def test_a_vocabulary_is_bounded():
    check_vocabulary({"a": 0, "b": 1}, "here")
    with pytest.raises(ModelIndexError, match="tokens; it takes at most"):
        check_vocabulary({str(number): number for number in range(11)}, "here", most=10)
