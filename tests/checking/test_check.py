"""A model is compared with Diffusers, and the first tensor that diverges is named."""

from __future__ import annotations

import pytest
import torch

from safelight.checking.check import compare
from safelight.core.server_args import ServerArgs
from safelight.errors import InvalidParameterError
from safelight.loading.loader import load_pipeline
from safelight.stages.latent_preparation import LatentPreparationStage
from tests.recipes.flux import CAT, MAP, patch_resolutions, photo

FIELDS = {"prompt": CAT, "height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 24, "seed": 3}
TRUE_CFG = {"negative_prompt": MAP, "true_cfg_scale": 2.0}


@pytest.fixture(scope="module")
def reference(checkpoints):
    args = ServerArgs(str(checkpoints.folder()), device="cpu", backend="diffusers")
    return load_pipeline(args).get_module("pipeline")


@pytest.fixture
def ours(checkpoints):
    """Loaded for each test, which may break it; loading takes no time."""
    return load_pipeline(ServerArgs(str(checkpoints.folder()), device="cpu"))


def what_diverges(ours, reference, **fields):
    first = compare(ours, reference, fields).first
    return first and first.what


def test_a_correct_model_agrees_in_all_that_is_compared(ours, reference):
    report = compare(ours, reference, {**FIELDS, **TRUE_CFG})
    rows = {row.what: row for row in report.rows}
    assert report.first is None
    assert [what for what, row in rows.items() if row.verdict != "ok"] == [
        "transformer: freqs_cis",
        *(f"transformer: freqs_cis, call {number}" for number in (2, 3, 4)),
    ]
    expected = [
        "text_encoder: token ids",
        "text_encoder_2: hidden states, call 2",
        "timesteps",
        "sigmas",
        "initial noise",
        "guidance branches",
        "transformer: guidance",
        "transformer.transformer_blocks.0",
        "transformer.transformer_blocks.1",
        "transformer.single_transformer_blocks.1",
        "transformer: output",
        "transformer.transformer_blocks.1, call 2",
        "transformer: output, call 2",
        "latents after step 1",
        "transformer: output, call 4",
        "latents after step 2",
        "pixels",
        "transformer: uncond, stacked with another request",
    ]
    assert [what for what in rows if what in expected] == expected
    assert rows["transformer.transformer_blocks.0"].shape == "1x96x48 1x24x48"
    largest = rows["transformer: output"].largest
    assert largest is not None and 0 < largest < 1e-5


def test_the_hooks_are_gone_afterwards(ours, reference):
    compare(ours, reference, FIELDS)
    modules = [ours.get_module("transformer"), ours.get_module("text_encoder"), reference.transformer]
    hooks = [
        hook
        for root in (*modules, reference.text_encoder, reference.vae)
        for module in root.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert hooks == []
    assert {"encode", "prepare_latents"} & {*vars(reference.vae), *vars(reference)} == set()


def scale_weight(name):
    def damage(pipeline, _monkeypatch):
        with torch.no_grad():
            pipeline.get_module("transformer").get_submodule(name).weight.mul_(1.01)

    return damage


def norm_eps(pipeline, _monkeypatch):
    pipeline.get_module("transformer").single_transformer_blocks[1].norm.norm.eps = 1e-1


def attention_scale(pipeline, _monkeypatch):
    pipeline.get_module("transformer").transformer_blocks[1].attn.attention.softmax_scale = 1.0


def scheduler_shift(pipeline, _monkeypatch):
    pipeline.get_module("scheduler").register_to_config(max_shift=1.3)


def text_length(pipeline, monkeypatch):
    config = type(pipeline.config)
    spec = config.encode_prompt_spec
    monkeypatch.setattr(config, "encode_prompt_spec", lambda self, i, batch: longer(spec(self, i, batch), i))


def longer(spec, index):
    return type(spec)(spec.prompt, spec.negative_prompt, spec.max_length + 3 * index, spec.output)


def another_seed(_pipeline, monkeypatch):
    forward = LatentPreparationStage.forward

    def damaged(self, batch, server_args):
        forward(self, batch, server_args)
        batch.latents = batch.latents.roll(1, dims=1)
        return batch

    monkeypatch.setattr(LatentPreparationStage, "forward", damaged)


def pooled_text(pipeline, monkeypatch):
    """Nothing is wrong with what is encoded, but the model is given something else."""
    config = type(pipeline.config)
    kwargs = config.prepare_pos_cond_kwargs
    monkeypatch.setattr(
        config,
        "prepare_pos_cond_kwargs",
        lambda self, *args: {**kwargs(self, *args), "pooled_projections": torch.zeros(1, 32)},
    )


def guidance(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.config), "guidance_scale", lambda *args: 3.0)


def vae_shift(pipeline, _monkeypatch):
    object.__setattr__(pipeline.config, "vae_shift", 0.2)


def nan(pipeline, _monkeypatch):
    pipeline.get_module("transformer").single_transformer_blocks[0].proj_out.bias.data[0] = torch.nan


def negative_text(pipeline, monkeypatch):
    """The second call alone is given something else."""
    config = type(pipeline.config)
    kwargs = config.prepare_neg_cond_kwargs
    monkeypatch.setattr(
        config,
        "prepare_neg_cond_kwargs",
        lambda self, *args: {**kwargs(self, *args), "encoder_hidden_states": torch.zeros(1, 24, 40)},
    )


def later_bias(pipeline, _monkeypatch):
    """A layer that is another only when the timestep has gone down."""
    transformer = pipeline.get_module("transformer")
    times = []
    transformer.register_forward_pre_hook(lambda _m, _a, kwargs: times.append(kwargs["timestep"]), with_kwargs=True)
    layer = transformer.transformer_blocks[1].attn.to_v
    layer.register_forward_hook(lambda _m, _a, output: output + 0.1 if float(times[-1].min()) < 1 else output)


def no_branches(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.schema.params_cls, "num_branches", lambda self: 1)


def forgotten(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.config), "shared_kwargs", frozenset())


@pytest.mark.parametrize(
    ("damage", "first"),
    [
        (negative_text, "transformer: encoder_hidden_states, call 2"),
        (later_bias, "transformer.transformer_blocks.1.attn.to_v, call 3"),
        (no_branches, "guidance branches"),
        (forgotten, "transformer: cond, stacked with another request"),
        (text_length, "text_encoder_2: token ids"),
        (scheduler_shift, "timesteps"),
        (another_seed, "initial noise"),
        (pooled_text, "transformer: pooled_projections"),
        (scale_weight("x_embedder"), "transformer.x_embedder"),
        (scale_weight("time_text_embed.text_embedder.linear_2"), "transformer.time_text_embed.text_embedder.linear_2"),
        (scale_weight("transformer_blocks.0.attn.to_v"), "transformer.transformer_blocks.0.attn.to_v"),
        (scale_weight("transformer_blocks.1.ff.net.2"), "transformer.transformer_blocks.1.ff.net.2"),
        (norm_eps, "transformer.single_transformer_blocks.1.attn.to_q"),
        (attention_scale, "transformer.transformer_blocks.1.attn.to_out.0"),
        (scale_weight("proj_out"), "transformer.proj_out"),
        (guidance, "latents after step 1"),
        (vae_shift, "pixels"),
        (nan, "transformer.single_transformer_blocks.0.proj_out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_tensor_that_diverges_is_named(ours, reference, monkeypatch, damage, first):
    damage(ours, monkeypatch)
    assert what_diverges(ours, reference, **FIELDS, **TRUE_CFG) == first


def test_a_block_without_layers_that_diverge_is_named_itself(ours, reference, monkeypatch):
    """Here only the last gate of a block is another: every layer inside agrees."""
    block = ours.get_module("transformer").single_transformer_blocks[0]
    block.register_forward_hook(lambda _module, _args, output: output * 1.01)
    assert what_diverges(ours, reference, **FIELDS) == "transformer.single_transformer_blocks.0"


def test_the_rows_after_the_first_are_shown_on_demand(ours, reference):
    scale_weight("transformer_blocks.0.attn.to_v")(ours, None)
    report = compare(ours, reference, FIELDS)
    lines = report.table(whole=False).splitlines()
    assert lines[-2].startswith("transformer.transformer_blocks.0.attn.to_v ") and lines[-2].endswith("DIVERGES")
    assert lines[-1].endswith("more, made from it; --all shows them")
    assert len(report.table(whole=True).splitlines()) == len(report.rows) + 1
    assert "first at transformer.transformer_blocks.0.attn.to_v: largest difference" in report.summary()


def test_several_prompts_are_refused(ours, reference):
    with pytest.raises(InvalidParameterError, match="prompt"):
        compare(ours, reference, {**FIELDS, "prompt": [CAT, MAP]})


def test_kontext_with_guidance_and_a_picture_it_resizes(checkpoints, monkeypatch):
    patch_resolutions(monkeypatch)
    folder = str(checkpoints.folder("kontext"))
    ours = load_pipeline(ServerArgs(folder, device="cpu"))
    reference = load_pipeline(ServerArgs(folder, device="cpu", backend="diffusers")).get_module("pipeline")
    fields = {"prompt": MAP, "image": photo(70, 50), "max_area": 40 * 40, "num_inference_steps": 2, **TRUE_CFG}
    assert compare(ours, reference, fields).first is None
    monkeypatch.setattr("safelight.families.flux.config.KONTEXT_RESOLUTIONS", ((64, 64),))
    assert what_diverges(ours, reference, **fields) == "image for the VAE"
