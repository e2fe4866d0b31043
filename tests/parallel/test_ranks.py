"""The parts, on two ranks: messages, attention, branches, decoding in bands."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("length", [0, 1, 1016, 1017, 5000])
def test_a_message_arrives_whole(pools, length):
    assert pools(2).run("messages", length=length) == [{"message": True, "tensors": True}] * 2


def test_one_vote_against_is_heard_by_all(pools):
    assert pools(2).run("votes") == [[True, False]] * 2


def test_a_wait_for_a_partner_that_does_not_come_ends(pools):
    waited, _ = pools(2).run("lonely_wait", seconds=1.0)
    assert "imed out" in waited or "imeout" in waited


ATTENTION = [
    ([12], 0, {}),
    ([13], 5, {}),
    ([1], 3, {}),
    ([7, 9], 4, {}),
    ([7, 9], 4, {"masked": True}),
    ([10], 6, {"num_kv_heads": 2, "seed": 3}),
]


@pytest.mark.parametrize(("lengths", "num_replicated", "details"), ATTENTION)
@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_divided_attention_is_torch_s(pools, axis, lengths, num_replicated, details):
    differences = pools(2).run("attention", layout={axis: 2}, lengths=lengths, num_replicated=num_replicated, **details)
    assert max(differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "num_replicated", "details"), ATTENTION)
@pytest.mark.parametrize("layout", [{"ulysses": 2, "ring": 2}, {"ulysses": 4}, {"ring": 4}], ids=str)
def test_divided_attention_is_torch_s_on_four_ranks(pools, layout, lengths, num_replicated, details):
    if "num_kv_heads" in details and layout.get("ulysses", 1) > details["num_kv_heads"]:
        pytest.skip("more ranks than heads of keys")
    differences = pools(4).run("attention", layout=layout, lengths=lengths, num_replicated=num_replicated, **details)
    assert max(differences) < 1e-6


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
@pytest.mark.parametrize("fault", ["padding", "text"])
def test_these_tests_see_padding_that_is_attended_to_and_text_that_counts_twice(pools, axis, fault):
    differences = pools(2).run("attention", layout={axis: 2}, lengths=[13], num_replicated=5, fault=fault)
    assert max(differences) > 1e-3


@pytest.mark.parametrize(
    ("num_calls", "made", "collectives"),
    [(1, [[0], [0]], 0), (2, [[0], [1]], 1), (3, [[0, 2], [1, 2]], 1), (4, [[0, 2], [1, 3]], 2)],
)
def test_branches_run_on_different_ranks(pools, num_calls, made, collectives):
    answers = pools(2).run("branches", num_calls=num_calls, size_of_result=3)
    assert [answer["made"] for answer in answers] == made
    assert all(answer["right"] and answer["collectives"] == collectives for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("num_calls", [1, 2, 3, 4, 6])
def test_branches_run_on_four_ranks(pools, num_calls):
    answers = pools(4).run("branches", num_calls=num_calls, size_of_result=5)
    assert all(answer["right"] for answer in answers)
    assert {call for answer in answers for call in answer["made"]} == set(range(num_calls))
    assert max(len(answer["made"]) for answer in answers) == -(-num_calls // 4)


DECODES = [("kl", 8, 6, 1), ("kl", 9, 5, 1), ("wan", 7, 4, 3), ("wan, residual", 4, 3, 2), ("qwen", 5, 6, 1)]


@pytest.mark.parametrize(("kind", "height", "width", "num_frames"), DECODES)
def test_decoding_in_bands_is_the_library_s(pools, kind, height, width, num_frames):
    differences = pools(2).run("decode", kind=kind, height=height, width=width, num_frames=num_frames)
    assert max(differences) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("height", [3, 4, 11])
@pytest.mark.parametrize("kind", ["kl", "wan", "wan, residual", "qwen"])
def test_decoding_in_four_bands(pools, kind, height):
    """Three rows do not make four bands: each rank decodes them all."""
    differences = pools(4).run("decode", kind=kind, height=height, width=4, num_frames=2, seed=height)
    assert max(differences) < 1e-5


@pytest.mark.parametrize("kind", ["kl", "wan"])
def test_these_tests_see_a_missing_halo(pools, kind):
    differences = pools(2).run("decode", kind=kind, height=6, width=4, num_frames=1, fault=True)
    assert max(differences) > 1e-3


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan"])
def test_the_benchmark_sends_what_it_predicts(pools, family, layout):
    for answer in pools(2).run("benchmark_forward", family=family, layout=layout):
        assert answer["counted"] == answer["predicted"]


@pytest.mark.parametrize(
    ("recipe", "case"),
    [("FluxPipeline", "dev, true CFG"), ("WanPipeline", "2.1"), ("QwenImageEditPipeline", "own height")],
)
def test_encoders_on_one_rank_give_all_ranks_their_embeddings(pools, folders, recipe, case):
    assert pools(2).run("embeddings", folder=str(folders(recipe)), recipe=recipe, case=case) == [True, True]


def test_an_encoder_that_fails_ends_the_request_on_every_rank_and_that_alone(pools):
    assert pools(2).run("encoder_that_fails") == [
        ["RankFailedError: this rank's component failed", "[[1.0, 1.0]]", "None", "3"],
        ["RankFailedError: the first rank failed: MemoryError('no room')", "[[1.0, 1.0]]", "None", "3"],
    ]


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(
    ("recipe", "case"), [("FluxPipeline", "dev"), ("QwenImagePipeline", "48x80"), ("WanPipeline", "2.1")]
)
def test_requests_that_share_forwards_are_divided_too(pools, folders, recipe, case, layout):
    """Texts of unequal length are padded and masked together where the family has a mask."""
    folder = str(folders(recipe))
    for differences in pools(2).run("stacked", folder=folder, recipe=recipe, case=case, layout=layout):
        assert max(differences) < 1e-5


@pytest.mark.slow
def test_the_mesh_is_torch_s_and_neighbours_are_of_the_last_axis(pools):
    answers = pools(4).run("mesh_of", layout={"cfg": 2, "tp": 2})
    assert [answer["place"] for answer in answers] == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]]
    assert all(answer["torch"] == answer["own"] and answer["at"] == answer["place"] for answer in answers)
    assert answers[3]["own"] == {"cfg": [1, 3], "ring": [3], "ulysses": [3], "tp": [2, 3]}
    answers = pools(4).run("mesh_of", layout={"ring": 2, "ulysses": 2})
    assert all(answer["sequence"] == [0, 1, 2, 3] and answer["torch"] == answer["own"] for answer in answers)


def test_a_mesh_of_more_ranks_than_there_are_is_refused(pools):
    told, _ = pools(2).run("too_few", layout={"cfg": 2, "tp": 2})
    assert told == "devices: got 2; it takes 4, the product of 2 x 1 x 1 x 2 (cfg x ring x ulysses x tp)"


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(("recipe", "case"), [("FluxPipeline", "dev"), ("WanImageToVideoPipeline", "TI2V-5B")])
def test_layouts_stand_in_bfloat16(pools, folders, recipe, case, layout):
    variant = "ti2v" if "TI2V" in case else "default"
    asked = {"folder": str(folders(recipe, variant)), "recipe": recipe, "case": case, "layout": layout}
    assert max(pools(2).run("in_bfloat16", **asked)) < 0.05
