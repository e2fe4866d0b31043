"""What a model's JSON says of it: what is wrong there is named."""

from __future__ import annotations

import dataclasses

import pytest

from safelight import ServerArgs
from safelight.errors import ModelError, ModelIndexError
from safelight.loading.description import configure, sources
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from tests.loading.conftest import edit_json, refusal


def test_a_model_is_described_without_its_weights(checkpoints, tmp_path):
    """As it is when it is loaded, but for what is counted then."""
    bare = checkpoints.copy(tmp_path / "bare")
    for path in bare.rglob("*.safetensors"):
        path.unlink()
    config, schema = configure(dataclasses.replace(open_repository(bare, weights=False), name="the same"))
    loaded = load_pipeline(ServerArgs(str(checkpoints.folder()), device="cpu"))
    assert config == loaded.config
    assert schema == dataclasses.replace(loaded.schema, model="the same")


def test_sources_are_what_the_index_and_the_family_name(checkpoints, damaged):
    repository = open_repository(checkpoints.folder())
    found = sources(repository, repository.pipeline.pipeline_cls())
    assert found["transformer"].target.startswith("safelight.families.")
    assert found["vae"].target.startswith("diffusers:")
    assert found["vae"].folder == checkpoints.folder() / "vae"
    edit_json(damaged / "model_index.json", vae=...)
    repository = open_repository(damaged)
    with pytest.raises(ModelIndexError, match="vae is missing, and FluxPipeline needs it"):
        sources(repository, repository.pipeline.pipeline_cls())


CONFIGS: dict[tuple[str, str], list[dict[str, object]]] = {
    ("transformer", "config.json"): [
        {"num_layers": "x"},
        {"num_attention_heads": -3},
        {"in_channels": None},
        {"in_channels": -16},
        {"axes_dims_rope": 7},
        {"joint_attention_dim": 10**30},
    ],
    ("vae", "config.json"): [
        {"block_out_channels": 5},
        {"block_out_channels": []},
        {"act_fn": None},
        {"latent_channels": -4},
        {"sample_size": []},
    ],
    ("text_encoder", "config.json"): [
        {"hidden_size": "x"},
        {"hidden_size": -32},
        {"vocab_size": -1},
        {"dtype": "x"},
        {"dtype": []},
    ],
    ("text_encoder_2", "config.json"): [{"d_model": -3}, {"dense_act_fn": "os.system"}, {"num_layers": -3}],
    ("scheduler", "scheduler_config.json"): [{"num_train_timesteps": "x"}, {"time_shift_type": []}],
    ("tokenizer", "tokenizer_config.json"): [{"bos_token": 7}],
}


@pytest.mark.parametrize(
    ("component", "name", "change"),
    [(*file, change) for file, changes in CONFIGS.items() for change in changes],
    ids=str,
)
def test_wrong_values_in_a_configuration(damaged, component, name, change):
    edit_json(damaged / component / name, **change)
    refusal(damaged, ModelError)


@pytest.mark.parametrize(("component", "name"), CONFIGS)
@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_configuration_that_is_none(damaged, component, name, content):
    path = damaged / component / name
    path.unlink() if content is None else path.write_text(content)
    assert component in refusal(damaged)
