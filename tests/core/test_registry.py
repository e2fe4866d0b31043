"""Pipelines are found by being there, in our tree or in another package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safelight.core.pipeline import ComposedPipeline
from safelight.core.registry import get_pipeline
from safelight.errors import ModelIndexError
from tests.recipes import own_pipelines


def test_every_entry_resolves_to_its_classes():
    for name, entry in own_pipelines().items():
        assert issubclass(entry.pipeline_cls(), ComposedPipeline)
        assert entry.pipeline_cls().pipeline_name == name
        assert entry.sampling_param_cls().options()
        assert entry.pipeline_config_cls().task


def test_an_unknown_pipeline_lists_the_known_ones():
    with pytest.raises(ModelIndexError, match=r"'NoSuchPipeline' is not supported; known are .*FluxPipeline"):
        get_pipeline("NoSuchPipeline")


PLUGIN = """
from safelight import register_configs
register_configs(
    model_family="toy",
    pipeline_name="ToyPipeline",
    sampling_param_cls="safelight.core.params:SamplingParams",
    pipeline_config_cls="safelight.core.config:PipelineConfig",
    hf_model_paths=["someone/toy"],
    package="toy_models",
)
"""
PIPELINE = """
from safelight.core.pipeline import ComposedPipeline
class ToyPipeline(ComposedPipeline):
    pipeline_name = "ToyPipeline"
EntryClass = [ToyPipeline]
"""


def test_a_family_in_another_package_is_found_through_its_entry_point(tmp_path):
    package, metadata = tmp_path / "toy_models", tmp_path / "toy_models-0.1.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "pipeline.py").write_text(PIPELINE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_models\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[safelight.families]\ntoy = toy_models\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "from safelight.core.registry import pipelines; entry = pipelines()['ToyPipeline'];"
        "assert 'torch' not in sys.modules; print(entry.pipeline_cls().__module__, *entry.hf_model_paths)"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, timeout=240, capture_output=True, text=True)
    assert ran.stdout.split() == ["toy_models.pipeline", "someone/toy"]
