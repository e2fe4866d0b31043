"""Train the two tokenizers on the prompts: byte-level BPE for CLIP, Unigram for T5."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from training.shapes import split_scenes, varied_prompt_for

CLIP_MAX_LENGTH = 32
T5_MAX_LENGTH = 32
NUM_PROMPTS = 20000
START, END = "<|startoftext|>", "<|endoftext|>"
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def _prompts(seed: int) -> Iterator[str]:
    generator = np.random.default_rng(seed)
    scenes, _ = split_scenes()
    for index in generator.integers(len(scenes), size=NUM_PROMPTS):
        yield varied_prompt_for(scenes[index], generator)


def train_clip_tokenizer(seed: int, num_merges: int = 256) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's layout: bytes, bytes that end a word, merges, the two marks."""
    untrained = CLIPTokenizer()  # for its normalizer and its division into words
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = untrained.backend_tokenizer.normalizer
    trained.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(_prompts(seed), trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    # Every byte must be able to end a word, seen in training or not: any text has to tokenize.
    names = alphabet + [letter + "</w>" for letter in alphabet]
    names += [name for name, _ in pieces if name not in set(names)]
    vocab = {name: index for index, name in enumerate([*names, START, END])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_MAX_LENGTH)


def train_t5_tokenizer(seed: int) -> T5Tokenizer:
    """Unigram over the prompts' words and single characters; the latter spell any other word.

    The pieces are counted, not searched for: on so few words the Unigram trainer prunes the common
    ones into letters, and prompts then pass 32 tokens. Case counts; other letters are `<unk>`.
    """
    words = Counter(word for prompt in _prompts(seed) for word in prompt.rstrip(".").split())
    counts = Counter({"▁" + word.strip(","): count for word, count in words.items()})
    total = counts.total()
    pieces = [(piece, math.log(count / total)) for piece, count in counts.most_common()]
    rare = math.log(0.1 / total)
    pieces += [(letter, rare) for letter in ("▁", *string.printable.strip())]
    marks = [(mark, 0.0) for mark in (PAD, EOS, UNKNOWN)]
    return T5Tokenizer(vocab=[*marks, *pieces], extra_ids=0, model_max_length=T5_MAX_LENGTH)
