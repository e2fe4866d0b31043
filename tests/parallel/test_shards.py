"""What a rank has of a tensor."""

from __future__ import annotations

import pytest
import torch

from safelight.parallel.shards import Shard, divided


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [(1,), (1, 2), (1, 1, 1)])
def test_shards_are_the_tensor_part_by_part(dim, parts):
    whole = torch.arange(12.0 * 12).view(12, 12)
    shards = [divided((12, 12), dim, parts, rank, 2) for rank in range(2)]
    read = [shard.read(whole) for shard in shards if shard is not None]
    begun = 0
    for part in parts:
        length = 12 * part // sum(parts)
        place, own = slice(begun, begun + length), slice(begun // 2, (begun + length) // 2)
        joined = torch.cat([each.transpose(0, dim)[own] for each in read])
        assert torch.equal(joined, whole.transpose(0, dim)[place])
        begun += length


@pytest.mark.parametrize(("length", "parts"), [(9, (1,)), (10, (1, 2)), (9, (1, 2))])
def test_what_does_not_divide_is_no_shard(length, parts):
    assert divided((length, 4), 0, parts, 0, 2) is None


def test_only_its_slices_are_asked_for():
    asked = []

    class Stored:
        def __getitem__(self, places):
            asked.append(places)
            return torch.zeros(4, 2)

    assert Shard((4, 8), 1, ((2, 4),)).read(Stored()).shape == (4, 2)
    assert asked == [(slice(None), slice(2, 4))]
