"""Tokenizers and processors in a real repository: refused when it is opened, or when they are tried."""

from __future__ import annotations

import base64
import json
import struct

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessorPil

from safelight.core.executor import panics_as_errors
from safelight.errors import ModelError, ModelIndexError
from safelight.loading.classes import Source
from safelight.loading.components import in_words, load_component
from safelight.loading.description import configure
from safelight.loading.loader import describe
from safelight.loading.repository import open_repository
from safelight.loading.trials import SIDE, check_steps, check_tokens_fit, try_out
from tests.loading.conftest import edit_json


def loaded(folder, target):
    return load_component(Source(folder, target), torch.float32, torch.device("cpu"))


def panicking():
    """Return a table of characters that is one by its form, and whose trie leads out of it."""
    return base64.b64encode(struct.pack("<I", 4) + b"\xff" * 4 + b"x\0").decode()


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def test_an_expression_is_refused_before_it_runs(damaged):
    edit_json(damaged / "tokenizer" / "tokenizer.json", pre_tokenizer=SPLIT)
    with pytest.raises(ModelIndexError, match="pre_tokenizer: the expression"):
        open_repository(damaged)


def test_steps_of_a_loaded_tokenizer_are_looked_at_again(damaged):
    """As if its class had made them of another file."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = loaded(damaged / "tokenizer", "transformers:CLIPTokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a)*b"), "isolated")
    with pytest.raises(ModelIndexError, match="here: pre_tokenizer: the expression"):
        try_out(tokenizer, "here")
    tokenizer = loaded(damaged / "tokenizer", "transformers:CLIPTokenizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x" * 10**6)
    with pytest.raises(ModelIndexError, match="here: normalizer: prepend"):
        try_out(tokenizer, "here")


def test_a_panic_is_a_refusal_or_a_requests_error(damaged):
    path = damaged / "tokenizer_2" / "tokenizer.json"
    edit_json(path, normalizer={"type": "Precompiled", "precompiled_charsmap": panicking()})
    open_repository(damaged)
    with pytest.raises(ModelError, match="tokenizer_2: T5Tokenizer cannot be loaded: index out of bounds"):
        loaded(damaged / "tokenizer_2", "transformers:T5Tokenizer")

    class PanicException(BaseException):
        """What a panic is."""

    with pytest.raises(RuntimeError, match="compiled code panicked: x"), panics_as_errors():
        raise PanicException("x")
    for other in (KeyboardInterrupt, SystemExit):
        with pytest.raises(other), in_words("x"), panics_as_errors():
            raise other


def test_tokens_have_embeddings(damaged):
    tokenizer = loaded(damaged / "tokenizer", "transformers:CLIPTokenizer")
    encoder = loaded(damaged / "text_encoder", "transformers:CLIPTextModel")
    check_tokens_fit({"tokenizer": tokenizer, "text_encoder": encoder, "scheduler": None})
    tokenizer.add_tokens(["<beyond>"])
    with pytest.raises(ModelIndexError, match="its text encoder has"):
        check_tokens_fit({"tokenizer": tokenizer, "text_encoder": encoder})


@pytest.mark.parametrize("length", [10**6, 17, 10**30])
def test_texts_are_not_filled_up_beyond_the_encoders_positions(damaged, length):
    edit_json(damaged / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ModelIndexError, match="model_max_length"):
        configure(open_repository(damaged))


WRONG = [
    {"resample": 999},
    {"image_mean": [0.5]},
    {"size": {"x": 3}},
    {"image_std": [0.0] * 9},
    {"rescale_factor": "x"},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_a_processor_that_processes_nothing_is_refused(tmp_path, settings):
    CLIPImageProcessorPil().save_pretrained(tmp_path / "image_processor")
    target = "transformers:CLIPImageProcessorPil"
    made = loaded(tmp_path / "image_processor", target)(images=Image.new("RGB", (SIDE, SIDE)), return_tensors="np")
    assert made["pixel_values"].shape == (1, 3, 224, 224)
    edit_json(tmp_path / "image_processor" / "preprocessor_config.json", **settings)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(tmp_path / "image_processor", target)


def test_a_schema_is_described_of_the_same_files_alone(damaged):
    edit_json(damaged / "transformer" / "config.json", configuration_files=["../config.1.json"])
    with pytest.raises(ModelIndexError, match="configuration_files is refused"):
        describe(open_repository(damaged, weights=False))
    assert json.loads((damaged / "model_index.json").read_text())["_class_name"] == "FluxPipeline"


def test_an_encoder_that_wraps_another_is_looked_into():
    """As the package's multilingual CLIP does, which says nothing of its embeddings."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
    from transformers import PreTrainedTokenizerFast

    config = MCLIPConfig(
        numDims=16, transformerDimensions=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    encoder = MultilingualCLIP(config)
    with pytest.raises(NotImplementedError):
        encoder.get_input_embeddings()
    for size in (9, 10):
        words = {f"w{number}": number for number in range(size)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
        parts = {"tokenizer": tokenizer, "text_encoder": encoder}
        if size == 9:
            check_tokens_fit(parts)
        else:
            with pytest.raises(ModelIndexError, match="number 9; its text encoder has 9 embeddings"):
                check_tokens_fit(parts)


def test_a_processors_tokenizer_is_looked_at_too(damaged):
    from tokenizers import Regex, pre_tokenizers
    from transformers import CLIPProcessor

    tokenizer = loaded(damaged / "tokenizer", "transformers:CLIPTokenizer")
    processor = CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
    check_steps(processor, "here")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|a)*b"), "isolated")
    with pytest.raises(ModelIndexError, match="here: pre_tokenizer: the expression"):
        check_steps(processor, "here")
