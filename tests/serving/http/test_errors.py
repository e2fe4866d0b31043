"""The one form of an error, and what the log has of it."""

from __future__ import annotations

import json
import logging

import pytest

from safelight.errors import NotReadyError, QueueFullError, SafelightError
from safelight.serving.http.errors import MethodError, RangeError, TimedOutError, answerable, error_headers, raw_answer


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (NotReadyError("loading"), {"x-should-retry": "true", "retry-after": "5"}),
        (SafelightError("inside"), {"x-should-retry": "false"}),
        (TimedOutError("late"), {"connection": "close"}),
        (QueueFullError("full"), {"retry-after": "1"}),
        (RangeError(10), {"content-range": "bytes */10"}),
        (MethodError("GET"), {"allow": "GET"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_headers_say_whether_to_come_again(error, headers):
    assert error_headers(error) == headers


def test_a_mistake_of_ours_is_for_the_log_alone(caplog):
    with caplog.at_level(logging.ERROR):
        assert answerable(QueueFullError("full"), "req_1").code == "queue_full" and not caplog.records
        known = answerable(ZeroDivisionError("of ours"), "req_2")
    (record,) = caplog.records
    assert "req_2" in record.getMessage() and record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
    assert b"of ours" not in raw_answer(known) and known.status == 500


def test_an_answer_on_a_connection_that_ends():
    head, _, body = raw_answer(TimedOutError("late"), {"x-request-id": "req_3"}).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert status == "HTTP/1.1 408 Request Timeout" and len(lines) == len(headers)
    assert (headers["connection"], headers["x-request-id"]) == ("close", "req_3")
    assert int(headers["content-length"]) == len(body)
    assert json.loads(body)["error"]["code"] == "request_timeout"
