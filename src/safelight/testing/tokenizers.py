"""Tokenizers trained offline, in milliseconds, on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

CORPUS = (
    "a photo of a cat sitting on a red chair by the window",
    "an old map of the world, drawn in ink; ships, whales and a compass rose",
    "blurry, low quality, watermark",
    "Two dogs run across the wet field at dawn. The sky is orange!",
    "0123456789 {x} %s <|im_start|> naïve café 漢字",
)


def clip_tokenizer(folder: Path, max_length: int) -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer of CLIP's kind and save it."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    details = {"vocab_size": 700, "end_of_word_suffix": "</w>", "special_tokens": marks}
    clip = CLIPTokenizer(**_byte_level_bpe(normalizers.Lowercase(), **details), model_max_length=max_length)
    clip.save_pretrained(folder)
    return clip


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Train a Unigram tokenizer of T5's kind and save it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    vocabulary = [(token, score) for token, score in _trained(tokenizer, trainer)["vocab"]]
    t5 = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    t5.save_pretrained(folder)
    return t5


QWEN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen2_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer of Qwen's kind, with the tokens of chats and of images, and save it."""
    model = _byte_level_bpe(normalizers.NFC(), vocab_size=500)
    qwen = Qwen2Tokenizer(**model, additional_special_tokens=list(QWEN_TOKENS))
    qwen.save_pretrained(folder)
    return qwen


def _byte_level_bpe(normalizer: Any, **details: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = _trained(tokenizer, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **details))
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _trained(tokenizer: Tokenizer, trainer: Any) -> dict[str, Any]:
    tokenizer.train_from_iterator(CORPUS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
