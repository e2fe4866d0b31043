"""A body of JSON, parsed strictly: what two readers would read differently is refused."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any, NoReturn

from safelight.serving.http.errors import MalformedRequestError, TooLargeError
from safelight.serving.http.forms import about
from safelight.serving.http.long_texts import LongTexts
from safelight.serving.http.pieces import ControlError, has_more, pieces
from safelight.serving.http.spool import Spool
from safelight.serving.limits import Limits

_NUMBER_LENGTH = 400
_INTEGER_LENGTH = 40


def parse_json(spool: Spool, limits: Limits) -> tuple[dict[str, Any], tuple[()]]:
    """Return an object's fields; there are no files with it. Long texts stay where they are.

    Raises:
        MalformedRequestError: for what is not in JSON's grammar, has too many items, or names a field twice.
        TooLargeError: if too much is no long text.

    """
    data = spool.all().buffer()
    if all(piece.isspace() for piece in pieces(data)):
        raise MalformedRequestError("the body is empty; it takes a JSON object")
    if has_more(data, limits.json_items):
        raise MalformedRequestError(f"the body has more than {limits.json_items} items and escapes")
    try:
        texts = LongTexts(data, spool)
    except UnicodeError as error:
        raise MalformedRequestError("the body is not UTF-8") from error
    except ControlError as error:
        raise MalformedRequestError(f"the body is not JSON: {error}") from error
    del data
    if len(texts.rest) > limits.json_bytes:
        raise TooLargeError(f"the body has more than {limits.json_bytes} bytes beside long texts without escapes")
    return _loaded(texts), ()


def _loaded(texts: LongTexts) -> dict[str, Any]:
    try:
        value = json.loads(
            texts.rest.decode(),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        value = texts.put_back(value)
    except UnicodeError as error:
        raise MalformedRequestError("the body is not UTF-8, or has half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        where, error.doc = "" if texts.are_there else f" at character {error.pos}", ""
        raise MalformedRequestError(f"the body is not JSON: {error.msg}{where}") from error
    except RecursionError as error:
        raise MalformedRequestError("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise MalformedRequestError("the body is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise about(name, "is given twice")
        found[name] = value
    return found


def read_value(text: str) -> Any:
    """Return the value of a text of JSON, such as a form has it.

    Raises:
        MalformedRequestError: for what is not in JSON's grammar.

    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedRequestError(f"{text[:100]!r} is not JSON") from error


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedRequestError(f"the body is not JSON: {name} is no number")


def _finite(text: str) -> int | float:
    value = read_number(text) if len(text) <= _NUMBER_LENGTH else math.inf
    if not math.isfinite(value):
        raise MalformedRequestError("the body has a number that is too large or too long")
    return value


def read_number(text: str) -> int | float:
    """Return the value of a number in JSON's grammar: `3.0` and `3e0` are whole, to the last digit (JSON Schema)."""
    value = float(text)
    if abs(value) < 10.0**_INTEGER_LENGTH and (exact := Decimal(text)) == exact.to_integral_value():
        return int(exact)
    return value


def _integer(text: str) -> int:
    if len(text) > _INTEGER_LENGTH:
        raise MalformedRequestError(f"the body has a whole number of more than {_INTEGER_LENGTH} digits")
    return int(text)
