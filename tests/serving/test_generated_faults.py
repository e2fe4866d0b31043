"""Every route is fed generated faults, in its path, query, headers and body: each ends in an error that has a name."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.core.schema import ModelSchema
from safelight.errors import SafelightError, by_code
from safelight.serving.limits import Limits
from safelight.serving.own_fields import VIDEO_FIELDS, image_fields
from tests.serving.http_server import INSIDE, running
from tests.serving.stub_engine import EDIT_SCHEMA, IMAGE_SCHEMA, IMAGE_TO_VIDEO_SCHEMA, VIDEO_SCHEMA
from tests.serving.wire import ASYNC, GENERATIONS, finished_job, flat

KEY = "sk-a key of many characters"
SERVERS: dict[str, tuple[ModelSchema, dict[str, Any]]] = {
    "pictures": (IMAGE_SCHEMA, {}),
    "edits": (EDIT_SCHEMA, {"more": {"allowed_origins": ("https://a.example",), "response_format": "url"}}),
    "videos": (VIDEO_SCHEMA, {"key": KEY}),
    "moving pictures": (IMAGE_TO_VIDEO_SCHEMA, {"key": KEY, "more": {"allowed_origins": ("*",)}}),
    "loading": (EDIT_SCHEMA, {"state": "loading"}),
}
LIMITS = Limits(max_cost=20_000, image_pixels=100_000, parts=16, ping_seconds=1.0)


class Kept(logging.Handler):
    """Keeps what is logged of errors."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.ERROR)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Fed:
    """A server, the ids that it knows, and what its log says."""

    def __init__(self, server: Any, records: list[logging.LogRecord]) -> None:
        self.server, self.records, self.ids = server, records, ["x"]
        self.routes = [
            (method, route.path) for route in flat(server.server.config.loaded_app) for method in route.methods
        ]
        self.address = ""

    def send(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> tuple[int, str, bytes]:
        """Send a request as it stands; return status, content type and body of the answer."""
        names = {name for name, _ in headers}
        if self.server.key is not None and "authorization" not in names:
            headers = [("authorization", f"Bearer {KEY}"), *headers]
        headers = [("connection", "close"), ("content-length", str(len(body))), *headers]
        headers = headers if "host" in names else [("host", "localhost"), *headers]
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        request = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
        with self.server.connect() as sock, sock.makefile("rb") as file:
            with contextlib.suppress(ConnectionError):  # it may be refused before it is read
                sock.sendall(request)
            status = int(file.readline().split()[1])
            told = {}
            while line := file.readline().decode("latin-1").strip():
                name, _, value = line.partition(":")
                told[name.lower()] = value.strip()
            return status, told.get("content-type", ""), file.read()

    def check(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes = b"") -> int:
        """Send a request, and hold its answer to the rules; return the status."""
        status, kind, answer = self.send(method, target, headers, body)
        said = (method, target, headers, body[:3000], status, answer[:2000])
        assert status < 500 or status == 503, said
        if status >= 400 and method != "HEAD":
            assert kind == "application/json", said
            error = json.loads(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}, said
            assert by_code(error["code"]) is not SafelightError, said
            assert not INSIDE.search(error["message"]), said
            assert status != 503 or error["code"] == "not_ready", said
        assert b"internal_error" not in answer, said
        assert not self.records, (said, [record.getMessage() for record in self.records])
        return status


@pytest.fixture(scope="module", params=SERVERS)
def fed(request, tmp_path_factory):
    schema, more = SERVERS[request.param]
    records: list[logging.LogRecord] = []
    handler = Kept(records)
    logging.getLogger().addHandler(handler)
    try:
        with running(tmp_path_factory.mktemp("fed"), schema, limits=LIMITS, **more) as server, server.http() as http:
            fed = Fed(server, records)
            if request.param != "loading":
                path = "/v1/videos" if schema.task.makes_video else GENERATIONS
                fields = {"prompt": "x"} | ({"image": PICTURES[0]} if schema.num_input_images[0] else {})
                job = finished_job(http, http.post(path, json=fields, headers=ASYNC).json()["id"])
                fed.ids.append(job["id"])
                fed.address = job["outputs"][0]["url"].partition("?")[2]
            yield fed
    finally:
        logging.getLogger().removeHandler(handler)


def picture(kind="PNG", size=(32, 48)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind)
    return file.getvalue()


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


FILES = [
    picture(),
    picture("JPEG"),
    picture("GIF"),
    picture(size=(400, 400)),
    picture()[:50],
    b"",
    b"\xff\xfe\0",
    b"RIFF",
]
PICTURES = [
    *map(data_url, FILES),
    "data:,",
    "data:;base64,A",
    "data:image/png;base64,@",
    "/etc/passwd",
    "https://x/a.png",
]
SCHEMAS = (IMAGE_SCHEMA, EDIT_SCHEMA, VIDEO_SCHEMA, IMAGE_TO_VIDEO_SCHEMA)
FIELDS = sorted(
    {*image_fields(Limits()), *VIDEO_FIELDS, "mask", "num_images_per_prompt", "generator", "latents"}
    | {name for schema in SCHEMAS for name in schema.params_cls.options()}
)
CHOICES = ["auto", "64x64", "96x64", "0x0", "url", "b64_json", "high", "hd", "png", "jpeg", "mp4", "tiny", "org/tiny"]
TEXTS = st.text(max_size=12) | st.sampled_from(
    [*CHOICES, *PICTURES, "\ud800", "\0", "{{x}}", "x" * 9000, "", "1", "-1", "1e9"]
)
NUMBERS = (
    st.integers() | st.floats() | st.sampled_from([0, 1, 1.0, 5, 9, 2**63, 2**64, 2**64 - 1, 1e308, 10**39, 16, 64])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = st.sampled_from(["image_url", "file_id", "url", "0", "", "a"]) | st.text(max_size=3)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
NAMES = st.sampled_from(FIELDS) | st.text(max_size=8)
JUNK = [
    "",
    "x",
    "%00",
    "%ff",
    "%ed%a0%80",
    "..",
    "a%2fb",
    "'",
    "%",
    "%F0%9F%98%80",
    "x" * 3000,
    "-1",
    "1.5",
    "1e999",
    "9" * 60,
]
HEADERS: dict[str, list[str]] = {
    "authorization": [f"bearer {KEY}", "Bearer", "Bearer \xff", "Basic eA==", "", "Bearer " + "x" * 5000],
    "origin": ["null", "http://[", "https://a.example", "https://a.example:x", "\xff", "", "://", "http://x"],
    "host": ["[", "a b", "\xff", "x:99999999", "[::1]:1", "", "a/b?c#d", "user@host", "x, y", "\u00fc.example"],
    "prefer": ["respond-async", "respond-async;;=,", ",", "wait=x, respond-async", "\xff"],
    "range": [
        "bytes=0-",
        "bytes=-",
        "bytes=-1",
        "bytes=99999999999-",
        "bytes=1-0",
        "bytes=" + "0-1," * 9,
        "x=\xff",
        "bytes",
    ],
    "if-range": ['"x"', 'W/"x"', "\xff", "Fri, 27 Nov 2026 00:00:00 GMT"],
    "idempotency-key": ["k", "\xff" * 10, "x" * 300, "", " ", "'; DROP TABLE jobs; --"],
    "content-encoding": ["gzip", "identity", "\xff", "", "identity, gzip"],
    "content-type": [
        *("", ";;;", "\xff", "application/json", "Application/JSON; charset=UTF-8", "application/json; charset=\xff"),
        *("application/json; charset*=x''y", "application/json; charset", 'application/json; charset="', "text/plain"),
        *('multipart/form-data; boundary="', "multipart/form-data; boundary=\xff", "multipart/form-data; boundary*0=b"),
        *("multipart/form-data", "multipart/form-data; boundary=b; boundary=c", "multipart/form-data; boundary=b b"),
        *(
            "multipart/mixed; boundary=b",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=" + "b" * 400,
        ),
    ],
    "expect": ["100-continue", "x"],
    "access-control-request-method": ["POST", "\xff", ""],
    "access-control-request-headers": ["x, y", "\xff", ""],
    "x-request-id": ["mine", "\xff"],
    "forwarded": ["for=x;host=y;proto=z"],
    "x-forwarded-host": ["\xff"],
    "accept": ["\xff", "text/event-stream"],
}
ONE_HEADER = st.sampled_from([(name, value) for name, values in HEADERS.items() for value in values])
SOME_HEADERS = st.lists(ONE_HEADER, max_size=3, unique_by=lambda header: header[0])
QUERY_NAMES = ["after", "limit", "order", "index", "variant", "expires", "signature", "stream", "x", "%ff", ""]
QUERY_VALUES = [*JUNK, "0", "1", "2.0", "asc", "video", "thumbnail", "0" * 64, "=", "a&b"]
QUERIES = st.lists(st.tuples(st.sampled_from(QUERY_NAMES), st.sampled_from(QUERY_VALUES)), max_size=3)
MARK = "b0undary"
PART_TYPES = [
    None,
    "image/png",
    "text/plain",
    "text/plain; charset=utf-16",
    "application/json",
    "\xff",
    ";",
    'a; charset="',
]
PART_ENDS = ["", '; filename="a.png"', "; filename*=utf-8''a", '; filename=""', '; filename="\xff\0"', '; name="n"']
DISPOSITIONS = ["form-data", "Form-Data", "attachment", "", ";"]
QUICK: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def target_of(data, fed, path):
    """Draw the values in a path, its spelling, and a query."""
    target = re.sub(r"\{[^}]*\}", lambda _: data.draw(st.sampled_from([*fed.ids, *fed.ids, "org%2Ftiny", *JUNK])), path)
    target = data.draw(st.sampled_from([target, target, target + "/", target.replace("/", "//")]))
    query = "&".join(f"{name}={value}" for name, value in data.draw(QUERIES))
    query = data.draw(st.sampled_from([query, query, fed.address, f"{fed.address}&{query}", fed.address[:-1]]))
    return f"{target}?{query}" if query else target


@settings(max_examples=120, **QUICK)
@given(data=st.data())
def test_paths_queries_and_headers(fed, data):
    method, path = data.draw(st.sampled_from(fed.routes))
    method = data.draw(
        st.sampled_from([method, method, method, "HEAD", "GET", "OPTIONS", "DELETE", "PUT", "POST", "BREW"])
    )
    fed.check(method, target_of(data, fed, path), data.draw(SOME_HEADERS))


@pytest.mark.parametrize("name", QUERY_NAMES)
def test_each_value_in_a_query(fed, name):
    """One at a time, on the routes that read one."""
    for path in ("/v1/videos", f"/v1/jobs/{fed.ids[-1]}/content", f"/v1/videos/{fed.ids[-1]}/content"):
        for value in QUERY_VALUES:
            fed.check("GET", f"{path}?{name}={value}", [])


@pytest.mark.parametrize("name", HEADERS)
def test_each_value_of_a_header(fed, name):
    """One at a time, with what is open, what is a file, and what has a body."""
    for value in HEADERS[name]:
        fed.check("GET", "/livez", [(name, value)])
        fed.check("GET", f"/v1/jobs/{fed.ids[-1]}/content", [(name, value)])
        fed.check("OPTIONS", GENERATIONS, [("origin", "https://a.example")] * (name != "origin") + [(name, value)])
        usual = [("content-type", "application/json")] * (name != "content-type")
        for path in (GENERATIONS, "/v1/images/edits", "/v1/videos"):
            fed.check("POST", path, [*usual, (name, value)], b'{"prompt": "x"}')


def json_body(data):
    """Draw a JSON object that has some of the right fields, with some of the right values."""
    fields = {"prompt": "x", "size": "64x64", **data.draw(st.dictionaries(NAMES, VALUES, max_size=4))}
    return json.dumps(fields).encode()


def form_body(data):
    """Draw a form that has some of the right parts, written in some of the right ways."""
    parts = [
        ("prompt", b"x", "form-data", "", None, None),
        ("image", FILES[0], "form-data", PART_ENDS[1], "image/png", None),
    ]
    brackets = st.sampled_from(["", "", "[]", "[0]", "[a]", "[][b]", "[", "[[]]", "[]" * 6])
    for _ in range(data.draw(st.integers(0, 4))):
        name = data.draw(st.sampled_from(FIELDS)) + data.draw(brackets)
        text = data.draw(SCALARS.map(lambda value: str(value).encode("utf-8", "surrogatepass")))
        content = data.draw(st.sampled_from([text, text, *FILES]))
        disposition, end = data.draw(st.sampled_from(DISPOSITIONS)), data.draw(st.sampled_from(PART_ENDS))
        coding = data.draw(st.sampled_from([None, None, None, "base64", "8bit", "\xff"]))
        parts.append((name, content, disposition, end, data.draw(st.sampled_from(PART_TYPES)), coding))
    body = b""
    for name, content, disposition, end, kind, coding in parts[data.draw(st.integers(0, 2)) :]:
        lines = [f'Content-Disposition: {disposition}; name="{name}"{end}']
        lines += [f"Content-Type: {kind}"] * (kind is not None)
        lines += [f"Content-Transfer-Encoding: {coding}"] * (coding is not None)
        body += f"--{MARK}\r\n".encode() + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content + b"\r\n"
    return body + f"--{MARK}--\r\n".encode()


def damaged(data, body):
    """Change, cut or double some bytes, sometimes."""
    if not body or not data.draw(st.sampled_from([False, False, True])):
        return body
    changed = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    first, last = sorted(data.draw(st.tuples(st.integers(0, len(body)), st.integers(0, len(body)))))
    how = data.draw(st.sampled_from(["whole", "cut", "doubled", "without"]))
    pieces = {"whole": changed, "cut": changed[:last], "doubled": changed[:last] + changed[first:]}
    return bytes(pieces.get(how, changed[:first] + changed[last:]))


@pytest.mark.parametrize("kind", ["json", "form"])
@settings(max_examples=80, **QUICK)
@given(data=st.data())
def test_bodies(fed, kind, data):
    posts = [path for method, path in fed.routes if method == "POST"]
    target = target_of(data, fed, data.draw(st.sampled_from(posts)))
    body = damaged(data, json_body(data) if kind == "json" else form_body(data))
    usual = "application/json" if kind == "json" else f"multipart/form-data; boundary={MARK}"
    headers = [("content-type", usual)]
    for name, value in data.draw(SOME_HEADERS):
        headers = [header for header in headers if header[0] != name] + [(name, value)]
    fed.check("POST", target, headers, body)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_with_each_wrong_value(fed, name):
    """One at a time, so that no other fault hides it, and on the route that knows it."""
    makes_video = fed.server.engine._schema.task.makes_video
    path = (
        "/v1/videos"
        if makes_video
        else ("/v1/images/edits" if fed.server.engine._schema.num_input_images[1] else GENERATIONS)
    )
    base = {"prompt": "x"} | ({"image": PICTURES[0]} if fed.server.engine._schema.num_input_images[1] else {})
    wrong = [
        True,
        "2",
        "",
        2.5,
        -1,
        0,
        10**39,
        1e308,
        2**64,
        [],
        {},
        [None],
        [[1]],
        {"a": 1},
        {"image_url": 3},
        "\ud800",
        "\0",
    ]
    wrong += ["x" * 9000, "\uff11", *PICTURES[:3], [PICTURES[0]] * 2, [{"image_url": PICTURES[0]}], [{"file_id": "x"}]]
    for value in wrong:
        body = json.dumps({**base, name: value}).encode()
        fed.check("POST", path, [("content-type", "application/json")], body)


@pytest.mark.parametrize(
    "body", ['{"%s": 1}', '{"prompt": "x", "model": "%s"}', '{"prompt": "x", "size": "%s"}', '{"seed": "%s"}']
)
def test_a_name_of_megabytes_is_not_sent_back(fed, body):
    """Nor compared with what is known, which would take seconds and a gigabyte."""
    data = (body % ("x" * (20 << 20))).encode()
    for path in (GENERATIONS, "/v1/images/edits", "/v1/videos"):
        began = time.monotonic()
        status, _, answer = fed.send("POST", path, [("content-type", "application/json")], data)
        assert status in (400, 404, 503) and len(answer) < 3000
        assert time.monotonic() - began < 5


def test_a_right_request_is_still_answered(fed):
    """Last: after all of them the server is as it was."""
    expected = 503 if fed.server.engine.schema is None else 200
    schema = fed.server.engine._schema
    fields = {"prompt": "x"} | ({"image": PICTURES[0]} if schema.num_input_images[0] else {})
    body, path = json.dumps(fields).encode(), "/v1/videos" if schema.task.makes_video else GENERATIONS
    assert fed.check("POST", path, [("content-type", "application/json")], body) == expected
    assert fed.check("GET", "/livez", []) == 200 and fed.check("GET", "/readyz", []) == expected
