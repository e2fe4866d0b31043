"""The gate of a model's folder: what is checked is what a library reads."""

from __future__ import annotations

import pytest

from safelight.errors import CheckpointError, ModelIndexError
from safelight.loading.repository import open_repository
from safelight.loading.settings import ELSEWHERE
from tests.loading.conftest import edit_json


def test_a_folder_sends_no_library_to_another(damaged):
    (damaged / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is refused"):
        open_repository(damaged)


@pytest.mark.parametrize("setting", sorted(ELSEWHERE["tokenizer_config.json"]))
def test_a_tokenizer_reads_no_file_that_its_settings_name(damaged, tmp_path, opened, setting):
    value = str(tmp_path / "canary.json")
    (tmp_path / "canary.json").write_text("{}")
    opened.clear()
    edit_json(damaged / "tokenizer" / "tokenizer_config.json", **{setting: [value] if setting[-1] == "s" else value})
    with pytest.raises(ModelIndexError, match=f"{setting} is refused"):
        open_repository(damaged)
    assert not any("canary" in name for name in opened)
