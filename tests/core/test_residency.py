"""Components come to the device when a unit needs them, and the least recently used leave it for others."""

import pytest

from safelight.core.residency import Residency


class Counted:
    """A placement that is only counted, and may fail to enter."""

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes
        self.inside = False
        self.fails = False

    def enter(self):
        assert not self.inside
        if self.fails:
            raise MemoryError
        self.inside = True

    def leave(self):
        assert self.inside
        self.inside = False


@pytest.fixture
def placements():
    return {"text_encoder": Counted(40), "transformer": Counted(70), "vae": Counted(10)}


def test_the_least_recently_used_leave(placements):
    residency = Residency(placements, dict.fromkeys(placements, 100))
    assert [residency.is_resident(name) for name in (*placements, "fixed")] == [False, False, False, True]
    residency.bring(["vae"])
    residency.bring(["text_encoder"])
    residency.bring(["vae"])
    assert residency.resident() == ("text_encoder", "vae") and residency.num_bytes == 50
    residency.bring(["transformer"])  # 120 with both: the text encoder was used before the VAE
    assert residency.resident() == ("vae", "transformer")
    residency.bring(["transformer"])
    residency.bring(["fixed"])
    residency.bring([])
    assert (residency.num_swaps, residency.bytes_brought) == (3, 120)
    assert [placement.inside for placement in placements.values()] == [False, True, True]
    residency.clear()
    assert residency.num_bytes == 0 and not any(placement.inside for placement in placements.values())


def test_room_is_that_of_what_runs(placements):
    """The VAE needs much room for what it computes: others leave although it is on the device already."""
    residency = Residency(placements, {"text_encoder": 115, "transformer": 120, "vae": 60})
    residency.bring(["vae"])
    residency.bring(["transformer"])
    residency.bring(["text_encoder"])
    assert residency.resident() == ("transformer", "text_encoder")
    residency.bring(["vae"])
    assert residency.resident() == ("text_encoder", "vae")


def test_several_at_one_time(placements):
    """The least of their rooms is what there is."""
    residency = Residency(placements, {"text_encoder": 80, "transformer": 120, "vae": 120})
    residency.bring(["transformer"])
    residency.bring(["vae", "text_encoder"])
    assert set(residency.resident()) == {"vae", "text_encoder"}


def test_one_that_cannot_come_leaves_the_others_right(placements):
    residency = Residency(placements, dict.fromkeys(placements, 75))
    residency.bring(["text_encoder"])
    placements["transformer"].fails = True
    with pytest.raises(MemoryError):
        residency.bring(["transformer"])
    assert residency.resident() == ()
    placements["transformer"].fails = False
    residency.bring(["transformer"])
    assert residency.resident() == ("transformer",)


@pytest.mark.parametrize(
    ("resident", "asked", "missing"),
    [
        ([], ["transformer", "fixed"], 70),
        (["vae"], ["transformer"], 60),
        (["text_encoder"], ["text_encoder"], 0),
        (["text_encoder"], ["vae"], -30),
        (["text_encoder", "vae"], ["fixed"], -50),
    ],
)
def test_what_must_still_come_is_told(placements, resident, asked, missing):
    residency = Residency(placements, dict.fromkeys(placements, 100))
    residency.bring(resident)
    assert residency.missing_bytes(asked) == missing
