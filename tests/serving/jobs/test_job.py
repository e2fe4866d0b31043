"""What a job is and may become, its record, and the digest of what it was asked by."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from safelight.core.form import Form
from safelight.serving.clocks import Moment
from safelight.serving.http.spool import LongText, Spool
from safelight.serving.jobs.job import MAX_ATTEMPTS, Job, JobError, StoredFile, StoredOutput, read_job, request_digest

QUEUED = Job(id="image_1", kind="image", model="m", params={}, created_at=1.0, lease=3)
FORMS = {
    "queued": QUEUED,
    "begun": QUEUED.begun(2.0),
    "begun again": QUEUED.begun(2.0).begun(3.0),
    "completed": QUEUED.begun(2.0).completed([], [], {}),
    "failed": QUEUED.failed(JobError("cancelled", "c")),
    "failed later": QUEUED.begun(2.0).failed(JobError("cancelled", "c")),
}
NEXT = {
    "queued": {"begun", "failed"},
    "begun": {"begun again", "completed", "failed later"},
    "begun again": set[str](),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(FORMS, FORMS)))
def test_what_a_job_may_become(old, new):
    assert FORMS[old].may_become(FORMS[new]) == (new in NEXT.get(old, ()))


def test_its_first_attempt_says_when_it_began_and_in_which_form():
    once = QUEUED.begun(2.0, Form("eager"), Moment("a", 5.0))
    twice = once.begun(3.0, Form("compiled"), Moment("a", 6.0))
    assert (twice.attempts, twice.started_at, twice.began, twice.form) == (2, 2.0, Moment("a", 5.0), Form("eager"))
    assert QUEUED.begun(2.0).begun(3.0, Form("compiled")).form == Form("compiled"), "the first died before it was told"
    assert not twice.may_become(twice.begun(4.0)) and twice.attempts == MAX_ATTEMPTS


def test_its_files_are_those_it_was_given_and_those_it_made():
    sheet = StoredFile("sheet", 3)
    output = StoredOutput("video", "video/mp4", 8, 8, 10, 1, extras={"spritesheet": sheet})
    job = msgspec.structs.replace(QUEUED, inputs=(StoredFile("in", 7, "image"),), outputs=(output,))
    assert job.files == [StoredFile("in", 7, "image"), StoredFile("video", 10), sheet]
    assert job.num_bytes == 20 + len(job.record) and read_job(job.record) == msgspec.structs.replace(job, lease=None)


def test_digests_see_values_and_files_and_not_the_order_of_names():
    fields = {"prompt": "a", "n": 1}
    same = request_digest({"n": 1, "prompt": "a"}, [b"x", b"y"])
    assert request_digest(fields, [b"x", b"y"]) == same
    others = [request_digest(fields), request_digest(fields, [b"y", b"x"]), request_digest(fields, [b"xy"])]
    assert len({same, *others, request_digest({**fields, "n": 2}, [b"x", b"y"])}) == 5


@pytest.mark.parametrize(("mode", "form"), [(None, None), ("compiled", Form("compiled"))])
def test_a_record_of_an_earlier_version_is_read(mode, form):
    """It had no form, or a mode in its place; and what is written now is read as it was."""
    job = Job(id="image_1", kind="image", model="m", params={}, created_at=1.0, form=Form("eager"))
    assert read_job(job.record).form == Form("eager")
    earlier = msgspec.json.decode(job.record)
    del earlier["form"]
    assert read_job(msgspec.json.encode({**earlier, **({} if mode is None else {"mode": mode})})).form == form


def test_a_long_text_and_a_short_one_are_told_apart_by_a_digest(tmp_path):
    def digest(prompt: Any) -> str:
        return request_digest({"prompt": [{"text": prompt}]})

    spool = Spool(tmp_path)
    first, second = (
        LongText(spool, stored.begin, len(stored)) for stored in (spool.add(b"a" * 99), spool.add(b"b" * 99))
    )
    assert len({digest(first), digest(second), digest("a" * 99)}) == 3 and digest(first) == digest(first)
