"""Solvers and VAEs beyond a family's own: run as the reference does, through its package, or refused by name."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from safelight import DiffusionGenerator, ServerArgs
from safelight.errors import InvalidParameterError, ModelIndexError, SafelightError, UsageError
from safelight.loading.loader import load_pipeline
from safelight.loading.repository import open_repository
from safelight.testing.recipes import shake
from tests.loading.conftest import edit_json
from tests.recipes import all_recipes

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED = {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
FIELDS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {},
    "FluxKontextPipeline": {"max_area": 32 * 48},
    "QwenImagePipeline": {"true_cfg_scale": 2.0, "negative_prompt": "blurry"},
    "WanPipeline": {"num_frames": 5},
}
COMMON: dict[str, Any] = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 4}
BOUND = 1e-4


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a function that gives a folder of a pipeline with a component of another class."""
    number = iter(range(1000))

    def of(name, component, cls, config):
        folder = tmp_path_factory.mktemp("fallback") / str(next(number))
        all_recipes()[name].build(folder, "default")
        for path in (folder / component).iterdir():
            path.unlink()
        made: Any = getattr(diffusers, cls)(**config)
        if isinstance(made, torch.nn.Module):
            shake(made, 3)
        made.save_pretrained(folder / component)
        edit_json(folder / "model_index.json", **{component: ["diffusers", cls]})
        return folder

    return of


def reference(name, folder, **fields):
    """Return what the package makes, or what it raises."""
    try:
        pipe: Any = getattr(diffusers, name).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe(generator=generator, output_type="np", **{**COMMON, **FIELDS[name], **fields})[0])
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        return error


def ours(name, folder, **fields):
    """Return what we make, and warn of."""
    with DiffusionGenerator.from_pretrained(folder, device="cpu") as generator:
        result = generator.generate(seed=0, output_type="np", **{**COMMON, **FIELDS[name], **fields})
    return (result.videos if name == "WanPipeline" else result.images), result.warnings


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "WanPipeline"])
@pytest.mark.parametrize(
    "config",
    [
        {**FLOW, "flow_shift": 3.0},
        SHIFTED,
        {**FLOW, "use_karras_sigmas": True},
        {**FLOW, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    ],
    ids=str,
)
def test_a_solver_of_the_table_runs_natively(built, name, config):
    folder = built(name, "scheduler", "UniPCMultistepScheduler", config)
    assert open_repository(folder).pipeline.backend == "native"
    pictures, warnings = ours(name, folder)
    expected = reference(name, folder)
    assert np.abs(pictures - expected).max() <= BOUND and warnings == []
    assert np.abs(ours(name, folder, num_inference_steps=3)[0] - expected).max() > BOUND


def test_noise_levels_that_the_solver_would_not_take_are_refused(built):
    """The reference drops them without a word."""
    folder = built("FluxPipeline", "scheduler", "UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0})
    given = {"num_inference_steps": 2, "sigmas": [1.0, 0.4]}
    assert np.array_equal(
        reference("FluxPipeline", folder, **given), reference("FluxPipeline", folder, num_inference_steps=2)
    )
    with pytest.raises(InvalidParameterError, match=r"sigmas: .*solver has its own"):
        ours("FluxPipeline", folder, **given)
    other = built("QwenImagePipeline", "scheduler", "UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0})
    assert (
        np.abs(
            ours("QwenImagePipeline", other, **given)[0] - ours("QwenImagePipeline", other, num_inference_steps=2)[0]
        ).max()
        > BOUND
    )


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "WanPipeline"])
def test_a_solver_for_other_noise_is_refused_when_it_is_loaded(built, name):
    folder = built(name, "scheduler", "UniPCMultistepScheduler", {})
    assert isinstance(reference(name, folder), ValueError)
    with pytest.raises(ModelIndexError, match=r"scheduler: use_flow_sigmas: .* UniPCMultistepScheduler"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


SOLVERS = [
    ("FlowMatchLCMScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ("DPMSolverMultistepScheduler", SHIFTED),
    ("DPMSolverSinglestepScheduler", FLOW),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DDIMScheduler", {}),
    ("DEISMultistepScheduler", FLOW),
]
DRAWS = {"FlowMatchLCMScheduler", "EulerAncestralDiscreteScheduler"}
"""Solvers that draw noise at each step, of which the reference takes it from wherever it is."""


FAMILIES = ["FluxPipeline", "QwenImagePipeline", "WanPipeline"]
"""Every solver falls back in one of them in the quick tests, and in all of them in the others."""


@pytest.mark.parametrize(
    ("cls", "config", "name"),
    [
        pytest.param(*solver, name, marks=[] if number % len(FAMILIES) == place else pytest.mark.slow)
        for number, solver in enumerate(SOLVERS)
        for place, name in enumerate(FAMILIES)
    ],
    ids=str,
)
def test_other_solvers_fall_back_and_say_so(built, caplog, name, cls, config):
    """The picture is the package's to the byte; where it fails, one line says so."""
    folder = built(name, "scheduler", cls, config)
    expected = reference(name, folder)
    with caplog.at_level(logging.WARNING, logger="safelight.loading.loader"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))
    note = f"{name} has no scheduler {cls} here: it runs through the diffusers package"
    assert note in caplog.messages
    if isinstance(expected, Exception):
        with pytest.raises(UsageError, match=f"{name} cannot run these values"):
            ours(name, folder)
    else:
        made, warnings = ours(name, folder)
        assert warnings == [note]
        assert cls in DRAWS or np.array_equal(made, expected)
        assert made.shape == expected.shape and np.isfinite(made).all()
    with pytest.raises(ModelIndexError, match=f"scheduler: class '{cls}' is not supported"):
        load_pipeline(ServerArgs(str(folder), device="cpu", backend="native"))


def test_another_vae_falls_back(built):
    folder = built(
        "FluxPipeline",
        "vae",
        "AutoencoderTiny",
        {"latent_channels": 4, "encoder_block_out_channels": (8, 8)}
        | {"decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    )
    made, warnings = ours("FluxPipeline", folder)
    assert np.array_equal(made, reference("FluxPipeline", folder))
    assert warnings == ["FluxPipeline has no vae AutoencoderTiny here: it runs through the diffusers package"]
    with pytest.raises(ModelIndexError, match="vae: class 'AutoencoderTiny' is not supported"):
        load_pipeline(ServerArgs(str(folder), device="cpu", backend="native"))


def test_several_at_once_are_all_named(built):
    folder = built("FluxPipeline", "scheduler", "FlowMatchLCMScheduler", {})
    edit_json(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    (note,) = open_repository(folder).notes
    assert "scheduler FlowMatchLCMScheduler and text_encoder CLIPTextModelWithProjection" in note


def test_the_transformer_is_the_familys(built):
    folder = built("FluxPipeline", "scheduler", "FlowMatchEulerDiscreteScheduler", {})
    edit_json(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(ModelIndexError, match="transformer: class 'SD3Transformer2DModel' is not supported"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


@pytest.mark.parametrize(
    "entry", [["diffusers", "NewSolverOfNextYear"], ["my_code", "FlowMatchLCMScheduler"], ["diffusers", "FluxPipeline"]]
)
def test_a_class_that_is_nobodys_is_refused_by_name(built, entry):
    folder = built("FluxPipeline", "scheduler", "FlowMatchLCMScheduler", {})
    edit_json(folder / "model_index.json", scheduler=entry)
    with pytest.raises(ModelIndexError, match=rf"scheduler: class '{entry[1]}'"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_a_pipeline_that_the_package_lacks_does_not_fall_back(built):
    folder = built("WanPipeline", "vae", "AutoencoderTiny", {})
    edit_json(folder / "model_index.json", _class_name="WanDMDPipeline")
    with pytest.raises(ModelIndexError, match="vae: class 'AutoencoderTiny' is not supported"):
        load_pipeline(ServerArgs(str(folder), device="cpu"))


def test_settings_mean_the_same_through_the_package(built):
    folder = built("FluxPipeline", "scheduler", "FlowMatchLCMScheduler", {})
    with pytest.raises(SafelightError, match="offload: got 'components'; it takes none on cpu"):
        load_pipeline(ServerArgs(str(folder), device="cpu", offload="components"))
    vae = load_pipeline(ServerArgs(str(folder), device="cpu", vae_tiling="exact")).vae
    assert vae is not None and type(vae.decoder).__name__ == "GroupNormBandDecoder"
