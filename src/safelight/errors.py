"""Every error that Safelight raises on purpose, as one tree.

A user's mistake names the field, what it got and what it takes. `exit_code` is what the command line ends with:
2 for usage, 3 for a model that cannot be loaded, 4 for a port or socket, 5 for the state directory, 1 for a generation
that failed. `status` and `code` are what a server answers with.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Self

MAX_NAME = 100
"""Characters of a name that was given: longer than any that is known."""
MAX_REASON = 300
"""Characters of a library's message that ours repeats."""


class SafelightError(Exception):
    """Base of every error that Safelight raises on purpose.

    Attributes:
        exit_code: what the command line ends with.
        status: of the HTTP answer.
        code: its name in an answer of the server.
        param: the parameter that it is about, if it is about one.

    """

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    param: str | None = None

    @classmethod
    def rebuilt(cls, message: str, param: str | None = None) -> Self:
        """Return an error of this class with a message that another process wrote."""
        error = cls.__new__(cls)
        Exception.__init__(error, message)
        error.param = param
        return error


class UsageError(SafelightError):
    """What was asked for cannot be done as it was asked."""

    exit_code = 2
    status = 400
    code = "invalid_request"


class InvalidParameterError(UsageError):
    """A parameter has a value that this model does not take.

    Attributes:
        param: the parameter's name.

    """

    code = "invalid_value"

    def __init__(self, param: str, got: object, takes: str) -> None:
        self.param = param
        super().__init__(f"{param}: got {shown(got)}; it takes {takes}")


class UnknownParameterError(UsageError):
    """A parameter that this model does not have.

    Attributes:
        param: the name that was given, or the first characters of a long one.

    """

    code = "unknown_parameter"

    def __init__(self, param: str, known: Iterable[str], instead: str | None = None) -> None:
        self.param = param[:MAX_NAME]
        hint = instead or nearest(param, known)
        super().__init__(f"unknown parameter {shown(param)}: {hint}")


class PackageError(UsageError):
    """The package that runs a pipeline cannot run it with the values that it was given."""

    code = "not_runnable"


class OutputError(UsageError):
    """A result cannot be written where it was asked to go."""


class MissingDependencyError(UsageError):
    """An optional package is needed; the message names the extra that brings it."""


class ModelError(SafelightError):
    """A model cannot be loaded."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No model repository under that name or path."""

    status = 404
    code = "model_not_found"


class ModelAccessError(ModelError):
    """The repository is gated or private, and the token does not open it."""


class ModelIndexError(ModelError):
    """`model_index.json`, or a component's configuration, is missing, malformed, or asks for what is not supported."""


class CheckpointError(ModelError):
    """A checkpoint's files are missing, damaged, of a refused kind, or do not fit the model."""


class WorkerStartError(ModelError):
    """The process that loads the model cannot be started, or ends before it has."""


class CompilationError(ModelError):
    """A model cannot be compiled, or a request that began in its compiled form cannot have it again."""

    code = "compilation_failed"


class NonFiniteOutputError(SafelightError):
    """Latents or pixels hold NaN or infinity; no picture is made of them."""

    code = "non_finite_output"


class RankFailedError(SafelightError):
    """Another of the ranks that work on this request failed at it, and has the reason."""

    code = "rank_failed"


class ServingError(SafelightError):
    """The server cannot do now what it was asked to do."""

    status = 503


class NotReadyError(ServingError):
    """The model is loading, the worker starts again, or the server is about to stop."""

    code = "not_ready"


class QueueFullError(ServingError):
    """As many requests wait as may.

    Attributes:
        retry_after: seconds after which there may be room.

    """

    status = 429
    code = "queue_full"
    retry_after: float = 1.0


class RateLimitError(QueueFullError):
    """A key has had as many requests as it may for now."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class WorkerLostError(ServingError):
    """The worker died, or was killed because it hung, while it worked on this request."""

    code = "worker_lost"


class DeviceLostError(ServingError):
    """The device has failed and takes no more work from this process, which ends; another one starts."""

    code = "device_lost"


class OutOfMemoryError(ServingError):
    """The request needs more memory than there is; a smaller one may pass."""

    code = "out_of_memory"


class DeadlineError(ServingError):
    """The request's time was over before it began."""

    status = 504
    code = "deadline_exceeded"


class CancelledError(ServingError):
    """The request was cancelled by whoever sent it."""

    status = 409
    code = "cancelled"


class ConflictError(ServingError):
    """An idempotency key came before, with another request."""

    status = 409
    code = "idempotency_conflict"


class StorageError(ServingError):
    """What a server keeps cannot be read or written now."""

    @staticmethod
    def of(error: OSError, what: str) -> StorageError:
        """Return what the system's error is to a client, who is told no path; `what` failed."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageFullError(f"{what}: there is no room")
        return StorageFailedError(f"{what}: the disk fails")


class StorageFullError(StorageError):
    """There is no room for the request's outputs."""

    status = 507
    code = "storage_full"


class StorageBusyError(StorageError):
    """Another program holds the jobs' database."""

    code = "storage_busy"


class StorageFailedError(StorageError):
    """The disk fails, or cannot be written any more, or the jobs' database on it is damaged or gone."""

    code = "storage_failed"


class PortError(SafelightError):
    """A port or socket cannot be listened on."""

    exit_code = 4


class StateDirectoryError(SafelightError):
    """The state directory cannot be used: unwritable, full, of a newer version, held by another server, or not ours."""

    exit_code = 5


def by_code(code: str) -> type[SafelightError]:
    """Return the error class with this code; the base for an unknown one."""
    return _classes(SafelightError).get(code, SafelightError)


def _classes(base: type[SafelightError]) -> dict[str, type[SafelightError]]:
    """Return the first class with each code, from the base downward."""
    found = {base.code: base}
    for cls in base.__subclasses__():
        found = {**_classes(cls), **found}
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to `name`, or list them all."""
    names = sorted(known)
    # Of a long name the beginning: the comparison makes tables of every character, a gigabyte for a name of megabytes.
    close = difflib.get_close_matches(name[:MAX_NAME], names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def in_one_line(error: BaseException) -> str:
    """Return what a library's error says, as a part of our message; the name of its class where it says nothing."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def shown(value: object, limit: int = 80) -> str:
    """Represent a value for a message, cut to `limit` characters."""
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return f"{text[: limit - 1]}…"
    return text


def _pieces(value: object, limit: int) -> Iterator[str]:
    """Yield what `repr` gives, piece by piece, so that no more is made of a large value than is shown."""
    if isinstance(value, str | bytes | bytearray):
        yield repr(value[: limit + 1])
    elif isinstance(value, dict):
        for number, (name, entry) in enumerate(value.items()):
            yield ", " if number else "{"
            yield from _pieces(name, limit)
            yield ": "
            yield from _pieces(entry, limit)
        yield "}" if value else "{}"
    elif isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        yield opening
        for number, entry in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(entry, limit)
        yield f",{closing}" if opening == "(" and len(value) == 1 else closing
    elif isinstance(value, int) and value.bit_length() > 4 * limit:
        yield f"a whole number of {value.bit_length()} bits"  # whose digits take the square of their number
    else:
        yield repr(value)


def without_objects(text: str, instead: Callable[[str], str]) -> str:
    """Replace each `<... at 0x...>`, by which Python shows an object, by what `instead` makes of its inside.

    One pass: an expression that does it goes back from every character.
    """
    before, *others = text.split("<")
    found = [before]
    for other in others:
        inside, closed, following = other.partition(">")
        _, at, address = inside.rpartition(" at 0x")
        is_object = closed and at and inside[:1].isidentifier() and address.strip("0123456789abcdefABCDEF") == ""
        found.append(f"{instead(inside)}{following}" if is_object and address else f"<{other}")
    return "".join(found)
