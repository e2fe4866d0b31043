"""What is kept of a model's calls, under which names, and that nothing is left on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safelight.checking.record import (
    OUTPUT,
    Kind,
    Recorded,
    Recorder,
    block_names,
    leaf_names,
    recording_calls,
    recording_encoders,
    recording_method,
)


class Block(nn.Module):
    """A repeated one."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, hidden_states):
        return self.linear(self.norm(hidden_states))


class Model(nn.Module):
    """Two blocks between an embedder and a head."""

    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(3, 2)

    def forward(self, hidden_states, scale=1.0):
        hidden_states = self.embed(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (self.head(hidden_states) * scale,)


def test_names_of_blocks_and_of_their_leaves():
    assert block_names(Model()) == ["blocks.0", "blocks.1", "embed", "head"]
    assert leaf_names(Model(), "blocks.1") == ["blocks.1.norm", "blocks.1.linear"]
    assert leaf_names(Model(), "head") == ["head"]


def test_things_of_one_name_are_numbered_and_copied():
    recorder, tensor = Recorder(), torch.ones(2)
    recorder.add("sigmas", tensor, kind=Kind.EXACT)
    recorder.add("sigmas", tensor)
    tensor.zero_()
    kept = recorder.entries["sigmas"]
    assert isinstance(kept, Recorded) and kept.kind is Kind.EXACT and kept.tensors[0].tolist() == [1, 1]
    assert list(recorder.entries) == ["sigmas", "sigmas, call 2"]


def test_a_call_is_kept_with_its_arguments_and_what_is_inside_in_the_first_step():
    recorder, model, given = Recorder(), Model(), torch.ones(2, 3)
    with torch.no_grad(), recording_calls(recorder, "transformer", model, ["blocks.0", "not there"]):
        expected = model(given, scale=2.0)[0]
        recorder.step = 1
        model(hidden_states=given)
    first, second = recorder.calls
    assert first.entries.keys() == {": hidden_states", ".blocks.0", OUTPUT}
    assert torch.equal(first.entries[OUTPUT].tensors[0], expected) and first.num_rows == 2
    assert first.arguments["scale"] == 2.0
    assert second.entries.keys() == {": hidden_states", OUTPUT}
    assert second.title(OUTPUT) == "transformer: output, call 2" and (first.step, second.step) == (0, 1)
    model(given)
    assert len(recorder.calls) == 2 and not model._forward_hooks and not model._forward_pre_hooks


class Encoder(nn.Module):
    """Says of each token its number, and of a text their sum."""

    def forward(self, input_ids=None, attention_mask=None):
        return {"last_hidden_state": input_ids[..., None].float(), "pooler_output": input_ids.sum(1, keepdim=True)}


def test_padding_of_a_text_is_left_out_and_each_text_of_a_batch_is_one():
    recorder, encoder = Recorder(), Encoder()
    ids, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with recording_encoders(recorder, {"text_encoder": encoder}):
        encoder(ids, attention_mask=mask)
    kept = {what: entry.tensors[0].flatten().tolist() for what, entry in recorder.entries.items()}  # type: ignore[union-attr]
    assert kept == {
        "text_encoder: token ids": [5, 6],
        "text_encoder: hidden states": [5, 6],
        "text_encoder: token ids, call 2": [7],
        "text_encoder: hidden states, call 2": [7],
        "text_encoder: pooled": [11],
        "text_encoder: pooled, call 2": [7],
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_method_is_watched_as_long_as_the_block_runs(fails):
    class Owner:
        def twice(self, number, plus=0):
            return 2 * number + plus

    kept, owner = [], Owner()
    watching = recording_method(owner, "twice", lambda made, *args, **kwargs: kept.append((made, args, kwargs)))
    try:
        with watching:
            assert owner.twice(4, plus=1) == 9
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert kept == [(9, (4,), {"plus": 1})] and vars(owner) == {} and owner.twice(1) == 2
