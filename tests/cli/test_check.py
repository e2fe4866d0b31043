"""The command `check-model`: what it prints, and how it ends."""

from __future__ import annotations

import json

import pytest

from tests.loading.conftest import edit_json
from tests.recipes.flux import patch_resolutions, photo

SMALL = ("--height", 32, "--width", 48, "--max-sequence-length", 24)


def test_command_passes_on_a_correct_model(run, checkpoints):
    ended = run("check-model", checkpoints.folder(), *SMALL, "--steps", 3, "--seed", 5, "--device", "cpu")
    assert ended.code == 0
    assert "latents after step 3" in ended.out
    assert ended.out.splitlines()[-1].startswith("FluxPipeline agrees with Diffusers: ")


def test_command_on_a_pipeline_that_takes_images(run, checkpoints, monkeypatch, tmp_path):
    patch_resolutions(monkeypatch)
    photo(90, 60).save(tmp_path / "photo.png")
    given = ("--image", tmp_path / "photo.png", "--max-area", 48 * 48, "--no-auto-resize", "--max-sequence-length", 24)
    ended = run("check-model", checkpoints.folder("kontext"), *given, "--json")
    report = json.loads(ended.out)
    assert (ended.code, report["ok"], report["first_divergence"]) == (0, True, None)
    rows = {row["what"]: row for row in report["rows"]}
    assert rows["image for the VAE"]["verdict"] == rows["image latents"]["verdict"] == "ok"
    assert rows["image latents"]["shape"] == "1x4x30x44"
    assert rows["transformer: output"]["largest"] < 1e-4, "what check-model allows; the weights answer loudly"


def test_command_names_the_first_divergence(run, checkpoints, monkeypatch):
    monkeypatch.setattr("safelight.stages.packed_latents.linear_mu", lambda *args: 1.0)
    ended = run("check-model", checkpoints.folder(), *SMALL)
    assert ended.code == 1
    assert "FluxPipeline diverges first at timesteps: largest difference" in ended.out.splitlines()[-1]
    ended = run("check-model", checkpoints.folder(), *SMALL, "--json")
    assert ended.code == 1 and json.loads(ended.out)["first_divergence"]["what"] == "timesteps"


def test_own_sigmas_say_how_many_steps_there_are(run, checkpoints):
    ended = run("check-model", checkpoints.folder(), *SMALL, "--sigmas", "1.0,0.7,0.2")
    assert ended.code == 0 and "latents after step 3" in ended.out


def test_half_precision_follows_the_reference(run, checkpoints):
    assert run("check-model", checkpoints.folder(), *SMALL, "--dtype", "bfloat16").code == 0
    strict = run("check-model", checkpoints.folder(), *SMALL, "--dtype", "bfloat16", "--tolerance", 0)
    assert strict.code == 1


def test_what_cannot_be_compared_is_refused_by_name(run, checkpoints, tmp_path):
    damaged = checkpoints.copy(tmp_path / "damaged")
    edit_json(damaged / "model_index.json", _class_name="NoSuchPipeline")
    refused = run("check-model", damaged)
    assert (refused.code, refused.out) == (3, "") and "'NoSuchPipeline' is not supported" in refused.err
    edit_json(damaged / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "'StableDiffusionPipeline' is not supported" in run("check-model", damaged).err
    assert run("check-model", tmp_path / "nothing").code == 3
    assert run("check-model").code == 2
    wrong = run("check-model", checkpoints.folder(), "--height", 33)
    assert wrong.code == 2 and "height: got 33" in wrong.err
    wrong = run("check-model", checkpoints.folder(), "--tolerance", -1)
    assert wrong.code == 2


def test_a_model_that_diffusers_does_not_have_is_refused_before_it_is_loaded(run, checkpoints, monkeypatch):
    monkeypatch.setattr("safelight.backends.diffusers.has_pipeline", lambda class_name: False)
    monkeypatch.setattr("safelight.checking.check.load_pipeline", lambda args: pytest.fail("loaded"))
    refused = run("check-model", checkpoints.folder(), *SMALL)
    assert refused.code == 3 and "'FluxPipeline' is none of the diffusers package" in refused.err


def test_a_component_from_elsewhere_is_of_both(run, checkpoints):
    """Both have the other model's VAE: were it ours alone, the latents would be another's pixels."""
    other = ("--component", f"vae={checkpoints.folder('schnell')}")
    ended = run("check-model", checkpoints.folder(), *SMALL, *other, "--pipeline", "FluxPipeline")
    assert ended.code == 0 and ended.out.splitlines()[-1].startswith("FluxPipeline agrees with Diffusers: ")
    refused = run("check-model", checkpoints.folder(), *SMALL, "--component", "unet=/nowhere")
    assert refused.code == 2 and "component['unet']: got '/nowhere'" in refused.err
    refused = run("check-model", checkpoints.folder(), *SMALL, "--pipeline", "NoPipeline")
    assert refused.code == 2 and "pipeline: got 'NoPipeline'" in refused.err


def test_help_has_the_models_own_options(run, checkpoints):
    assert "--max-area" in run("check-model", checkpoints.folder("kontext"), "--help").out
    general = run("check-model", "--help").out
    assert "Both models are loaded" in general and "--tolerance" in general and "--max-area" not in general
