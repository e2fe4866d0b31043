"""What is free of memory, and what was taken at most."""

from __future__ import annotations

import mmap

from safelight.runtime.worker.memory_gauge import HostGauge


def test_the_hosts_memory_is_what_linux_says():
    gauge = HostGauge()
    before = gauge.begin()
    with mmap.mmap(-1, 64 << 20) as held:  # pages of its own: an allocator could give ones that are there already
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert 60 << 20 < gauge.peak() - before < 200 << 20
        assert gauge.free() > 0
