"""The list of the package's pipelines: what runs, what pictures select, and why others do not run."""

from __future__ import annotations

import diffusers
import pytest

from safelight.backends.diffusers import has_pipeline
from safelight.cli.main import main
from safelight.loading.listing import listed_pipelines


@pytest.fixture(scope="module")
def listed():
    return {each.name: each for each in listed_pipelines()}


@pytest.mark.slow
def test_every_class_is_there_with_a_reason_where_it_does_not_run(listed):
    assert {*filter(has_pipeline, dir(diffusers))} <= listed.keys()
    refused = {name: each.why_not for name, each in listed.items() if each.why_not}
    assert 10 < len(refused) < 60 and not any("\n" in why for why in refused.values())
    assert "no generator" in refused["LEditsPPPipelineStableDiffusionXL"]
    assert refused["AudioDiffusionPipeline"] == "it needs librosa", "of what is not installed"
    assert listed["FluxPipeline"].others == ("FluxImg2ImgPipeline", "FluxInpaintPipeline")
    assert listed["FluxImg2ImgPipeline"].about() == "; pictures select FluxPipeline, FluxInpaintPipeline"


@pytest.mark.slow
def test_the_command_lists_families_first_and_all_if_asked(capsys):
    for every in (False, True):
        with pytest.raises(SystemExit) as ended:
            main(["models", *["--all"] * every])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and "(flux)" in out
        assert ("StableCascadeDecoderPipeline (diffusers): does not run: it needs" in out) is every
        assert out.count("\nFluxPipeline (") == 1
