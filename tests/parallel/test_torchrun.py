"""What `torchrun` says of a process."""

from __future__ import annotations

import pytest

from safelight.errors import UsageError
from safelight.parallel.torchrun import Launched, launched

PLACE = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


@pytest.fixture
def environment(monkeypatch):
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_place_of_a_process_is_what_it_is_told(environment):
    assert launched(4) == Launched(rank=3, local_rank=1, num_ranks=4)


def test_a_process_that_nothing_launched_has_none(environment):
    environment.delenv("TORCHELASTIC_RUN_ID")
    assert launched(4) is None


def test_another_number_of_processes_is_refused(environment):
    with pytest.raises(UsageError, match="torchrun started 4 processes, and the settings ask for 2 devices"):
        launched(2)
