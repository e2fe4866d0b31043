"""Every bound on what a client may send, hold or ask for."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.serving.http_args import HTTPArgs


@dataclass(frozen=True)
class Limits:
    """Bounds of the HTTP API: what is beyond is refused by name, nothing is cut to fit. Four of them are settings.

    Attributes:
        body_bytes: of a request's body.
        held_bytes: of bodies, on disk but for small ones, over all requests that are under way; pictures decoded from
            data URLs take at most as many again. The last eighth of it is kept for small bodies.
        memory_bytes: of bodies in memory, over all requests that are under way; beyond, small ones too are on disk.
        small_body_bytes: of a body that is a small one.
        header_bytes: of a request's line and headers.
        headers: their number.
        json_items: commas, brackets and backslashes in a JSON body, images aside: what parsing costs.
        json_bytes: of a JSON body beside long texts without escapes, which data URLs are.
        parts: of a multipart body.
        image_bytes, image_pixels, image_side: of one input image, in its file, in all, and along a side.
        clip_bytes: of one input video, in its file.
        images: input images of one request.
        outputs: pictures or videos of one request.
        waiting: requests that may wait, of all clients; each has a share (`serving/admission.py`).
        max_cost: of one request: steps × tokens × branches × outputs, attention counted (`runtime/cost.py`).
        max_tokens: of one step, which cannot be interrupted.
        unit_seconds: after which a unit of work of a new kind counts as hung: no step may be expected to take longer.
        header_seconds: for a request's line and headers, from the first byte.
        request_seconds: for a whole request, from its first byte.
        body_seconds: for which a body may bring nothing.
        body_rate: bytes a second that it brings at least; what came faster counts for `body_seconds` at most.
        stalled_seconds: for which a reader may take nothing while there is something to take.
        deadline_seconds: for which a synchronous request may wait before it begins.
        ping_seconds: between two comments on a silent event stream.
        ranges: byte ranges in one `Range` header.
        page: jobs in one page of a list.
        key_length: characters of an `Idempotency-Key`.

    """

    body_bytes: int = 32 << 20
    held_bytes: int = 1 << 30
    memory_bytes: int = 32 << 20
    small_body_bytes: int = 1 << 20
    header_bytes: int = 32 << 10
    headers: int = 100
    json_items: int = 100_000
    json_bytes: int = 8 << 20
    parts: int = 128
    image_bytes: int = 16 << 20
    image_pixels: int = 25_000_000
    image_side: int = 8192
    clip_bytes: int = 32 << 20
    images: int = 16
    outputs: int = 10
    waiting: int = HTTPArgs.max_waiting
    max_cost: float = HTTPArgs.max_cost
    max_tokens: int = HTTPArgs.max_tokens
    unit_seconds: float = HTTPArgs.first_unit_limit
    header_seconds: float = 10.0
    request_seconds: float = 30.0
    body_seconds: float = 5.0
    body_rate: int = 16 << 10
    stalled_seconds: float = 60.0
    deadline_seconds: float = 600.0
    ping_seconds: float = 15.0
    ranges: int = 8
    page: int = 100
    key_length: int = 255
