"""Sizes of memory, as people write them."""

import pytest

from safelight import ServerArgs
from safelight.core.byte_sizes import parse_size, shown_size
from safelight.errors import InvalidParameterError
from safelight.loading.loader import load_pipeline


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 * 2**29),
        (" 80 GB ", 80 * 10**9),
        ("123456789012345678", 123456789012345678),
        (4096, 4096),
        ("7B", 7),
        ("2kB", 2000),
        ("2KiB", 2048),
    ],
)
def test_sizes_are_parsed(text, size):
    assert parse_size(text, "memory_limit") == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "24 GiBs", "-1", "0", "0GB", "1e9", "nan", "24G", "1,5GiB", "9" * 400 + "GB", 2**63, True, "٢GiB "],
)
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(InvalidParameterError, match=r"memory_limit: got .*; it takes bytes above 0, or a number with"):
        ServerArgs(memory_limit=text)


def test_sizes_are_shown():
    assert [shown_size(size) for size in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]


@pytest.mark.parametrize("settings", [{"offload": "auto"}, {"offload": "alternates"}, {"memory_limit": "1GiB"}])
def test_on_the_cpu_there_is_no_memory_to_plan_for(settings):
    (name,) = settings
    with pytest.raises(InvalidParameterError, match=f"{name}: got .* on cpu: there is no memory but the host's"):
        load_pipeline(ServerArgs(device="cpu", **settings))


@pytest.mark.parametrize("num_bytes", [1, 1023, 1025, 2**20 + 1, 2**30 - 1, 2**30 + 1, 12 * 2**30 + 12345, 10**12 + 7])
def test_a_size_that_is_needed_is_enough_as_it_is_shown(num_bytes):
    assert num_bytes <= parse_size(shown_size(num_bytes, up=True), "memory_limit") <= num_bytes * 1.02 + 1
