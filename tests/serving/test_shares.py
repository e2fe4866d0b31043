"""A client that sends all it can leaves places in every queue for the next one, and for the one after it."""

from __future__ import annotations

import concurrent.futures

import httpx
import pytest
from starlette.requests import Request

from safelight.errors import QueueFullError
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.shares import check_share, client_of
from tests.serving.http_server import PROMPT, running

GENERATIONS = "/v1/images/generations"


def fill(server, address, count, **headers):
    """Send requests from an address until each is taken or refused; return the statuses of those that were refused."""
    with (
        httpx.Client(base_url=server.url, transport=httpx.HTTPTransport(local_address=address), timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        taken = len(server.engine.submitted)
        asked = [
            pool.submit(http.post, GENERATIONS, json={"prompt": f"{PROMPT} [hold]"}, headers=headers)
            for _ in range(count)
        ]

        def settled():
            refused = [each for each in asked if each.done()]
            return len(server.engine.submitted) - taken + len(refused) >= count

        server.until(settled, 20.0)
        refused = [each.result().status_code for each in asked if each.done()]
        yield refused
        for each in asked:
            each.result()


def test_one_address_cannot_fill_the_queue(tmp_path):
    """Sixty-four requests wait at most: of one address 32 do, and 23 of another's are all taken."""
    with running(tmp_path, max_waiting=64) as server:
        first, second, third = (fill(server, f"127.0.0.{n}", count) for n, count in ((1, 60), (2, 23), (3, 4)))
        try:
            refused = next(first)
            assert refused and set(refused) == {429} and server.engine.stats.num_waiting == 32
            assert next(second) == [] and next(third) == []
        finally:
            server.call(server.engine.release)
        for filling in (first, second, third):
            assert next(filling, None) is None


def test_one_address_cannot_hold_all_jobs(tmp_path):
    with running(tmp_path, job_limits=JobLimits(max_unfinished=10)) as server:

        def create(address):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(base_url=server.url, transport=transport, headers={"prefer": "respond-async"}) as http:
                return http.post(GENERATIONS, json={"prompt": f"{PROMPT} [hold]"}).status_code

        assert [create("127.0.0.1") for _ in range(7)] == [202] * 5 + [429] * 2
        assert [create("127.0.0.2") for _ in range(4)] == [202] * 4
        assert create("127.0.0.3") == 202
        server.call(server.engine.release)


@pytest.mark.parametrize("num_places", [1, 2, 3, 10, 64, 1000])
def test_each_client_that_comes_finds_room(num_places):
    """Clients that each take all they can: none has more than half, and the queue is full after several, not one."""
    waiting: list[str] = []
    for number in range(num_places):
        try:
            while len(waiting) < num_places:
                check_share(str(number), waiting, num_places, len(waiting))
                waiting.append(str(number))
        except QueueFullError as error:
            assert str(number) in waiting and error.retry_after >= 1
        assert waiting.count(str(number)) <= max(1, num_places // 2)
    assert len(waiting) == num_places
    assert len(set(waiting)) >= (3 if num_places < 64 else 4) or num_places < 3, "the second leaves room for others"
    check_share("", waiting, num_places, len(waiting))


def test_a_client_is_a_key_at_an_address():
    def named(host, owner="k"):
        return client_of(Request({"type": "http", "client": (host, 1)}), owner)

    assert named("10.0.0.1") == named("::ffff:10.0.0.1") != named("10.0.0.2")
    assert named("2001:db8::1") == named("2001:db8::ffff:0:1") != named("2001:db8:0:1::1")
    assert named("fe80::1%eth0") == named("fe80::2") and named("10.0.0.1") != named("10.0.0.1", "other")
    assert named("not an address") != named("another")
