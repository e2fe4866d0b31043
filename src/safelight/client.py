"""A server, as the Python API and the command line see it. Imports no torch before something is generated."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx
import msgspec
from PIL import Image

from safelight import media
from safelight.clips import EncodedClip
from safelight.core.options import MEDIA_KINDS, NULL
from safelight.core.params import SamplingParams
from safelight.core.schema import ModelSchema
from safelight.errors import InvalidParameterError, QueueFullError, ServingError, by_code
from safelight.runtime.messages import SCHEMA_KEY, WireSchema, schema_from_wire

if TYPE_CHECKING:
    from safelight.results import GenerationEvent, GenerationOutput

TIMEOUT = httpx.Timeout(30.0, read=60.0)
"""Of connecting, sending and waiting for the next bytes, in seconds; servers comment every 15 s on a silent stream."""
FULL_SECONDS = 600.0
"""For which a full queue is waited for."""


class ServerError(ServingError):
    """A server cannot be reached, or answers what no Safelight server answers."""


@dataclass(frozen=True)
class _Event:
    """One server-sent event: its type, and the job that it is about."""

    type: str
    job: dict[str, Any]


class RemoteEngine:
    """One model of a server.

    Attributes:
        schema: what the model takes.

    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Connect, and ask what the model takes.

        Args:
            url: of the server, such as `http://127.0.0.1:8000`; a path after it is kept, but for `/v1`.
            api_key: the server's, if it asks for one.

        Raises:
            ServerError: if there is no such server.
            SafelightError: if it does not take the key.

        """
        if not url.startswith(("http://", "https://")):
            raise InvalidParameterError("url", url, "an address that begins with http:// or https://")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidParameterError("api_key", "something else", "the server's key: printable ASCII characters")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)
        except httpx.InvalidURL as error:
            raise InvalidParameterError(
                "url", url, "an address such as http://127.0.0.1:8000 or http://[::1]:8000"
            ) from error
        try:
            name = self._json("/v1/models")["data"][0]["id"]
            found = self._json(f"/v1/models/{name.replace('/', '%2F')}/schema")
            self.schema: ModelSchema = schema_from_wire(msgspec.convert(found[SCHEMA_KEY], WireSchema))
        except (LookupError, TypeError, AttributeError, msgspec.ValidationError) as error:
            self.close()
            raise ServerError(f"{self.url} answers, but not as a Safelight server of this version") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Return itself: leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def stream(self, each: list[SamplingParams]) -> Iterator[tuple[GenerationEvent, GenerationOutput | None]]:
        """Make one job an output, and yield how far they are, in order; with an output's last event, the output.

        Closing the iterator cancels what is not done.

        Raises:
            SafelightError: what the server answers.

        """
        for single in each:
            if single.output_type == "latent":
                raise InvalidParameterError("output_type", "latent", "pil, np or pt, from a server")
        jobs: list[str] = []
        finished = 0
        try:
            for single in each:
                jobs.append(self._submit(single))
            for index, (single, job_id) in enumerate(zip(each, jobs, strict=True)):
                for event in self._events(job_id):
                    if event.type == "failed":
                        error = event.job["error"]
                        raise by_code(error["code"]).rebuilt(error["message"], error["param"])
                    output = self._output(single, event.job) if event.type == "completed" else None
                    yield _progress(event, single, index, len(each)), output
                finished += 1
        finally:
            for job_id in jobs[finished:]:
                self._answer("DELETE", f"/v1/jobs/{job_id}")

    def _submit(self, params: SamplingParams) -> str:
        """Send one output's request; wait where the server's queue is full. Return the job's id."""
        path = "/v1/videos" if self.schema.task.lasts else "/v1/images/generations"
        body = wire_fields(params, self.schema)
        end = time.monotonic() + FULL_SECONDS
        while True:
            response = self._answer("POST", path, json=body, headers={"prefer": "respond-async"})
            if response.status_code != QueueFullError.status or time.monotonic() > end:
                return str(_checked(response)["id"])
            time.sleep(_retry_seconds(response))

    def _events(self, job_id: str) -> Iterator[_Event]:
        """Yield a job's events to its last."""
        try:
            with self._http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                if response.status_code != 200:
                    response.read()
                    _checked(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        event = _Event(**msgspec.json.decode(line[5:]))
                        yield event
                        if event.type in ("completed", "failed"):
                            return
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise ServerError(f"{self.url}: the connection ended before the job did") from error
        raise ServerError(f"{self.url}: the server stopped before the job was done")

    def _output(self, params: SamplingParams, job: Mapping[str, Any]) -> GenerationOutput:
        """Fetch a finished job's files, in the form asked for."""
        from safelight.results import output_from_files

        files = []
        for index in range(len(job["outputs"])):
            response = self._answer("GET", f"/v1/jobs/{job['id']}/content", params={"index": index})
            if response.status_code != 200:
                _checked(response)
            files.append(response.content)
        return output_from_files(files, params, job["stage_seconds"], job["warnings"], self.schema.task.makes_video)

    def _json(self, path: str) -> Any:
        return _checked(self._answer("GET", path))

    def _answer(self, method: str, path: str, **details: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **details)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url} cannot be reached: {error or type(error).__name__}") from error


def _progress(event: _Event, params: SamplingParams, index: int, count: int) -> GenerationEvent:
    from safelight.results import GenerationEvent

    job, num_steps = event.job, params.num_steps()
    step = num_steps if event.type == "completed" else job["step"] or 0
    return GenerationEvent(job["stage"] or job["state"], step, num_steps, index, count)


def wire_fields(params: SamplingParams, schema: ModelSchema) -> dict[str, Any]:
    """Return what of an output's parameters is not the model's default, as JSON; images as data URLs."""
    options = params.options()
    fields: dict[str, Any] = {}
    given = params.set_fields()
    defaults = schema.defaults_for(given)
    for name, value in given.items():
        if name in ("output_type", "n") or defaults.get(name) == value:
            continue
        if options[name].kind in MEDIA_KINDS:
            value = _each(value, data_url)
        fields[name] = _each(value, lambda entry: None if entry is NULL else entry)
    return fields


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value changed; of lists, each entry."""
    if isinstance(value, list | tuple):
        return [_each(entry, change) for entry in value]
    return None if value is None else change(value)


def data_url(image: Image.Image | EncodedClip) -> str:
    """Return a picture as text, without loss; of a clip, its file."""
    if isinstance(image, EncodedClip):
        return f"data:video/{image.kind};base64,{base64.b64encode(image.file).decode('ascii')}"
    file = media.encoded(image, "png", {"compress_level": 1}, None)
    return f"data:image/png;base64,{base64.b64encode(file).decode('ascii')}"


def _retry_seconds(response: httpx.Response) -> float:
    """Return how long a full server asks to be left alone, at most ten seconds."""
    asked = response.headers.get("retry-after", "")
    return min(10.0, float(asked)) if asked.isdecimal() else 1.0


def _checked(response: httpx.Response) -> Any:
    """Return an answer's JSON, or raise the error that it tells of."""
    try:
        content = response.json()
        if response.is_success:
            return content
        error = content["error"]
        raise by_code(error["code"]).rebuilt(error["message"], error["param"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(f"the server answers {response.status_code}, and no JSON of Safelight's") from error
