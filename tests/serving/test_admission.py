"""Who may ask for what: priority, work and requests a minute by key; places in every queue by key or address; jobs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from safelight.core.tenant import Tenant
from safelight.errors import InvalidParameterError, QueueFullError, RateLimitError
from safelight.preparation import prepare
from safelight.runtime.client import EngineStats
from safelight.serving.admission import Admission, AdmissionControl, client_of
from safelight.serving.fields import Asked, Resolved
from safelight.serving.http.errors import PriorityError
from safelight.serving.jobs.limits import JobLimits
from safelight.serving.limits import Limits
from safelight.serving.principals import ANYONE, Keys, Principal, owner_of
from tests.serving.http_server import PROMPT, assert_error, running
from tests.serving.stub_engine import IMAGE_SCHEMA, VIDEO_SCHEMA

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
                Admission(client=str(number)).check_place(num_places, len(waiting), waiting)
                waiting.append(str(number))
        except QueueFullError as error:
            assert str(number) in waiting and error.retry_after >= 1
        assert waiting.count(str(number)) <= max(1, num_places // 2)
    assert len(waiting) == num_places
    assert len(set(waiting)) >= (3 if num_places < 64 else 4) or num_places < 3, "the second leaves room for others"
    Admission().check_place(num_places, len(waiting), waiting)


def test_a_client_is_a_key_at_an_address():
    def named(host, owner="k"):
        return client_of(Request({"type": "http", "client": (host, 1)}), owner)

    assert named("10.0.0.1") == named("::ffff:10.0.0.1") != named("10.0.0.2")
    assert named("2001:db8::1") == named("2001:db8::ffff:0:1") != named("2001:db8:0:1::1")
    assert named("fe80::1%eth0") == named("fe80::2") and named("10.0.0.1") != named("10.0.0.1", "other")
    assert named("not an address") != named("another")


# By key

A, B, C = "a" * 32, "b" * 32, "c" * 32


def several(**fields):
    """Return three keys, of which the first has further fields."""
    keys = {key: Principal(key[0], owner_of(key), priority=0, is_one_of_several=True) for key in (A, B, C)}
    return Keys({**keys, A: dataclasses.replace(keys[A], **fields)})


def control(keys=None, limits=None, cost_seconds=0.0, **more):
    """Return admission beside an engine whose steps took so long."""
    engine: Any = SimpleNamespace(stats=EngineStats(cost_seconds=cost_seconds))
    return AdmissionControl(engine, keys or Keys(), limits or Limits(), **more)


def asked(principal=ANYONE):
    return Request({"type": "http", "client": ("10.0.0.1", 1), "state": {"principal": principal}})


def resolved(priority=0, **fields):
    params, _ = prepare(IMAGE_SCHEMA, {"prompt": PROMPT, **fields})
    return Resolved(Asked(IMAGE_SCHEMA, {"priority": priority}), params, [])


def test_as_what_a_request_is_admitted():
    by_key = control(several(share=0.25), Limits(deadline_seconds=7.0))
    (key, *_) = several(priority=3, share=0.25).principals
    owner = owner_of(A)
    of_key: Any = {"shares": {owner: 0.25}, "tenant": Tenant(owner, 0.25)}
    assert by_key.admit(asked(key), resolved(3), False) == Admission(owner, owner, 3, 7.0, **of_key)
    assert by_key.admit(asked(key), resolved(-10), True) == Admission(owner, owner, -10, None, **of_key)
    open_to_all = control(limits=Limits(deadline_seconds=7.0))
    assert open_to_all.admit(asked(), resolved(10), False) == Admission("", " 10.0.0.1", 10, 7.0)


def test_a_key_has_its_highest_priority():
    with pytest.raises(PriorityError, match="priority: got 4; this key takes at most 3") as caught:
        control().admit(asked(several(priority=3).principals[0]), resolved(4), False)
    assert (caught.value.status, caught.value.param) == (403, "priority")


def test_a_key_has_its_own_ceilings_of_work():
    """Cost and predicted seconds are 24 tokens x 4 steps x 1 branch, and grow with the outputs."""
    (key, *_) = several(max_cost=96.0).principals
    control().admit(asked(), resolved(n=2), False)
    control().admit(asked(key), resolved(n=1), False)
    with pytest.raises(InvalidParameterError, match="outputs are 192, and at most 96 are done"):
        control().admit(asked(key), resolved(n=2), False)
    with pytest.raises(InvalidParameterError, match="and at most 95 are done"):  # the server's own goes before
        control(limits=Limits(max_cost=95.0)).admit(asked(key), resolved(n=1), False)
    (key, *_) = several(max_seconds=1.0).principals
    control().admit(asked(key), resolved(n=10), False)  # nothing is known yet
    control(cost_seconds=0.01).admit(asked(key), resolved(), False)
    with pytest.raises(InvalidParameterError, match=r"n: got 2; it takes less: it would take about 1.9 s here, and"):
        control(cost_seconds=0.01).admit(asked(key), resolved(n=2), False)


def test_requests_a_minute_by_a_clock_that_nobody_sets():
    now = [100.0]
    keys = several(requests_per_minute=2)
    counting = control(keys, clock=lambda: now[0])
    first, second, _ = keys.principals

    def ask(key=first):
        counting.admit(asked(key), resolved(), False)

    ask()
    now[0] += 20
    ask()
    for _ in range(3):
        with pytest.raises(RateLimitError, match="2 generations a minute") as caught:
            ask()
        assert caught.value.retry_after == 40.0 and caught.value.status == 429
    ask(second)
    with pytest.raises(PriorityError):  # which is not counted
        counting.admit(asked(first), resolved(1), False)
    now[0] += 40
    ask()
    with pytest.raises(RateLimitError) as caught:
        ask()
    assert caught.value.retry_after == 20.0


@pytest.mark.parametrize("num_places", [2, 10, 64, 1000])
def test_each_key_finds_its_share(num_places):
    """Others that send all they can leave it, whoever comes first; and more than that while there is room."""
    shares = {"a": 0.5, "b": 0.25}
    waiting: list[str] = []

    def fill(client):
        with contextlib.suppress(QueueFullError):
            while True:
                Admission(client=client, shares=shares).check_place(num_places, len(waiting), waiting)
                waiting.append(client)

    for client in ("c", "d", "e", "a", "b"):
        fill(client)
    assert len(waiting) <= num_places
    assert waiting.count("a") >= num_places // 2 and waiting.count("b") >= num_places // 4
    waiting.clear()
    fill("a")
    assert num_places // 2 <= waiting.count("a") <= num_places * 3 / 4
    fill("b")
    assert waiting.count("b") >= num_places // 4


def test_a_principal_sees_its_own_jobs_alone(tmp_path):
    with running(tmp_path, keys=several()) as server, server.http() as http:
        heads = {key: {"authorization": f"Bearer {key}"} for key in (A, B)}

        def create(key, text=PROMPT):
            body = {"prompt": text, "priority": -1}
            answer = http.post(GENERATIONS, json=body, headers={**heads[key], "prefer": "respond-async"})
            assert answer.status_code == 202 and answer.json()["priority"] == -1
            return answer.json()["id"]

        def listed(key, **query):
            page = http.get("/v1/jobs", params=query, headers=heads[key]).json()
            assert page["object"] == "list"
            ids = [job["id"] for job in page["data"]]
            assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
            return ids, page["has_more"]

        mine, theirs = [create(A), create(A)], create(B)
        mine.append(create(A, f"{PROMPT} [hold]"))  # behind all others
        assert listed(A) == (mine[::-1], False) and listed(B) == ([theirs], False)
        assert listed(A, limit=2) == (mine[:0:-1], True)
        assert listed(A, after=mine[1], order="asc") == ([mine[2]], False)
        assert_error(http.get("/v1/jobs", params={"after": theirs}, headers=heads[A]), 400, "after")
        assert_error(http.get("/v1/jobs", params={"limit": 101}, headers=heads[A]), 400, "limit")
        assert_error(http.get("/v1/jobs", params={"kind": "x"}, headers=heads[A]), 400, "kind")
        assert_error(http.get("/v1/jobs"), 401)
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/content")):
            for job_id in (theirs, mine[2]):
                key = A if job_id == theirs else B
                assert_error(http.request(method, f"/v1/jobs/{job_id}{path}", headers=heads[key]), 404)
        assert http.get(f"/v1/jobs/{mine[2]}", headers=heads[A]).json()["state"] in ("queued", "in_progress")
        for key, job_id in ((A, mine[0]), (B, theirs)):
            until = http.get(f"/v1/jobs/{job_id}/events", headers=heads[key])
            assert until.text.count("event: completed") == 1
            url = http.get(f"/v1/jobs/{job_id}", headers=heads[key]).json()["outputs"][0]["url"]
            assert httpx.get(url).status_code == 200  # whoever has the address
        assert {request.priority for request in server.engine.submitted} == {-1}
        server.call(server.engine.release)


def test_videos_are_their_owners_too(tmp_path):
    with running(tmp_path, schema=VIDEO_SCHEMA, keys=several()) as server, server.http() as http:
        heads = {key: {"authorization": f"Bearer {key}"} for key in (A, B)}
        made = http.post("/v1/videos", json={"prompt": PROMPT, "priority": 0}, headers=heads[A]).json()
        assert [video["id"] for video in http.get("/v1/videos", headers=heads[A]).json()["data"]] == [made["id"]]
        assert http.get("/v1/videos", headers=heads[B]).json()["data"] == []
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/remix")):
            body = {"prompt": "x"} if path == "/remix" else None
            answer = http.request(method, f"/v1/videos/{made['id']}{path}", headers=heads[B], json=body)
            assert_error(answer, 404)
        assert_error(http.post("/v1/videos", json={"prompt": "x", "priority": 1}, headers=heads[A]), 403, "priority")


def test_priority_reaches_the_engine_in_all_three_forms(tmp_path):
    with running(tmp_path) as server, server.http() as http:
        http.post(GENERATIONS, json={"prompt": PROMPT, "priority": 7}).raise_for_status()
        http.post(GENERATIONS, json={"prompt": PROMPT, "priority": 8, "stream": True}).raise_for_status()
        http.post(GENERATIONS, json={"prompt": PROMPT, "priority": 9, "response_format": "url"}).raise_for_status()
        http.post(GENERATIONS, json={"prompt": PROMPT, "priority": None}).raise_for_status()
        assert [request.priority for request in server.engine.submitted] == [7, 8, 9, 0]
        for wrong in (11, -11, 0.5, "high", True):
            assert_error(http.post(GENERATIONS, json={"prompt": PROMPT, "priority": wrong}), 400, "priority")


def test_a_key_that_asks_too_often_is_told_when_to_come_again(tmp_path):
    with running(tmp_path, keys=several(requests_per_minute=1)) as server, server.http() as http:
        http.headers["authorization"] = f"Bearer {A}"
        http.post(GENERATIONS, json={"prompt": PROMPT}).raise_for_status()
        answer = http.post(GENERATIONS, json={"prompt": PROMPT})
        assert assert_error(answer, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert http.get("/v1/jobs").status_code == 200  # which generates nothing


def test_one_key_cannot_fill_the_queue(tmp_path):
    """From however many addresses: of 64 places 16 are kept for another, who has them; of the rest it has half."""
    with running(tmp_path, keys=several(share=0.25), max_waiting=64) as server:
        of = {key: {"authorization": f"Bearer {key}"} for key in (A, B, C)}
        fillings = [
            fill(server, f"127.0.0.{n}", count, **of[key]) for n, count, key in ((1, 30, B), (2, 20, B), (3, 16, A))
        ]
        try:
            refused = [*next(fillings[0]), *next(fillings[1])]
            assert len(refused) == 25 and set(refused) == {429} and server.engine.stats.num_waiting == 24
            assert next(fillings[2]) == []
        finally:
            server.call(server.engine.release)
        for filling in fillings:
            assert next(filling, None) is None
