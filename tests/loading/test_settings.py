"""Numbers of a configuration by its kind, and settings that would have a library read another file."""

from __future__ import annotations

import pytest

from safelight.errors import ModelIndexError
from safelight.loading.settings import NO_LENGTH, check_settings

TAKEN = [
    ("scheduler_config.json", "", {"num_train_timesteps": 1000, "shift": 1e9, "name": "x", "flag": True}),
    ("scheduler_config.json", "", {"lambda_min_clipped": float("-inf"), "trained_betas": [0.1, 0.2]}),
    ("config.json", "", {"rope_theta": 10**9, "vocab_size": 256_384, "text_config": {"hidden_size": 3584}}),
    ("preprocessor_config.json", "Qwen2VLProcessor", {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}),
    ("preprocessor_config.json", "CLIPImageProcessor", {"size": {"shortest_edge": 224}, "crop_size": 224}),
    ("tokenizer_config.json", "", {"model_max_length": 10**30, "special_tokens_map_file": "/x", "vocab_file": None}),
    ("preprocessor_config.json", "ClapFeatureExtractor", {"sampling_rate": 48_000, "nb_max_samples": 480_000}),
    ("tokenizer_config.json", "", {"model_max_length": 77, "added_tokens_decoder": {"49407": {"content": "x"}}}),
]
REFUSED = [
    ("scheduler_config.json", {"steps": -1_000_001}, "steps: got -1000001; it takes at most 1,000,000"),
    ("scheduler_config.json", {"shift": float("inf")}, "shift: got inf; it takes a finite number"),
    ("scheduler_config.json", {"betas": [0.1, {"x": [float("nan")]}]}, "x: got nan"),
    ("scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
    ("config.json", {"vocab_size": 10**12}, "vocab_size"),
    ("config.json", {"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ("config.json", {"rope_theta": float("nan")}, "rope_theta: got nan"),
    ("config.json", {"scaling_factor": float("inf")}, "scaling_factor"),
    ("config.json", {"configuration_files": ["../config.1.json"]}, "configuration_files is refused"),
    ("config.json", {"transformers_weights": "../x.safetensors"}, "transformers_weights is refused"),
    ("preprocessor_config.json", {"size": 10**6}, "size"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 65_536}}, "shortest_edge"),
    ("preprocessor_config.json", {"crop_size": {"height": 1e9, "width": 4}}, "height"),
    ("preprocessor_config.json", {"min_pixels": 10**9}, "min_pixels"),
    ("preprocessor_config.json", {"patch_size": 10**4}, "patch_size"),
    ("preprocessor_config.json", {"merge_size": 1000}, "merge_size"),
    ("preprocessor_config.json", {"temporal_patch_size": 10**6}, "temporal_patch_size"),
    ("preprocessor_config.json", {"rescale_factor": float("nan")}, "rescale_factor"),
    ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length: got 0"),
    ("tokenizer_config.json", {"model_max_length": -5}, "model_max_length"),
    ("tokenizer_config.json", {"model_max_length": 10**9}, "at most 2,097,152"),
    ("tokenizer_config.json", {"model_max_length": NO_LENGTH - 1}, "model_max_length"),
    ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length: got '77'"),
    ("tokenizer_config.json", {"model_max_length": True}, "model_max_length: got True"),
    ("tokenizer_config.json", {"extra_ids": 2**70}, "extra_ids"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5000000": {"content": "x"}}}, "5000000"),
    ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file is refused"),
    ("tokenizer_config.json", {"tokenizer_file": "../x.json"}, "tokenizer_file is refused"),
    ("tokenizer_config.json", {"vocab": "/etc/passwd", "merges": "/etc/passwd"}, "merges is refused"),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "fast_tokenizer_files is refused"),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "init_inputs is refused"),
]


@pytest.mark.parametrize(("name", "class_name", "config"), TAKEN, ids=str)
def test_what_published_models_have_is_taken(name, class_name, config):
    check_settings(config, name, "here", class_name)


def test_depth_is_bounded():
    nested: object = 1
    for _ in range(500):
        nested = [nested]
    with pytest.raises(ModelIndexError, match="'a': nested in more than 32"):
        check_settings({"a": nested}, "config.json", "here")


@pytest.mark.parametrize(("name", "config", "words"), REFUSED, ids=str)
def test_what_is_out_of_all_proportion_is_refused(name, config, words):
    with pytest.raises(ModelIndexError) as caught:
        check_settings(config, name, "here", "CLIPImageProcessor")
    assert words in str(caught.value) and str(caught.value).startswith("here: ")
