"""What the model is given at every step is made once a request."""

from __future__ import annotations

import torch

from safelight.stages.conditioning import ConditioningStage
from tests.stages.stubs import StubConfig, drive, request


def test_cond_is_made_where_and_in_what_the_embeddings_are():
    batch = request()
    batch.prompt_embeds = [torch.ones(1, 2), torch.ones(1, 3, 5, dtype=torch.bfloat16, device="meta")]
    drive(ConditioningStage(StubConfig()), batch)
    assert batch.cond == (torch.device("meta"), torch.bfloat16)
