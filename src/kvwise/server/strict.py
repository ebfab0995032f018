"""Bodies read strictly: checks before the first byte, bounded size, and one JSON value that means one thing."""

import re
from collections.abc import Callable, Coroutine, Sequence
from itertools import accumulate
from json import JSONDecodeError, JSONDecoder, dumps
from math import isinf
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from kvwise.server.errors import ApiError
from kvwise.server.settings import ServerSettings

Gate = Callable[[Request], Coroutine[Any, Any, None]]  # raises what the client is told, before the body is read

_BOM = b"\xef\xbb\xbf"
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # also one that does not end: linear in any case
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")
_SUSPICIOUS = (b"0" * 19, b"e000", b"e+000")  # digits written as zeros: what every number out of range has
_MAX_INTEGER = 2**63 - 1
_MAX_KEYS = 4096  # of one object: the schema's complaint about each unknown one is a slow way to say no


class StrictRoute(APIRoute):
    """A route whose body is one JSON value, read by `read_json`; pydantic sees it after that.

    `gates` run first, before a byte of the body is read: use `gated`.
    """

    gates: Sequence[Gate] = ()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the gates and the strict reader."""
        answer = super().get_route_handler()
        gates, has_body = self.gates, self.body_field is not None

        async def strict(request: Request) -> Response:
            for gate in gates:
                await gate(request)
            return await answer(await _parsed(request) if has_body else request)

        return strict


def gated(*gates: Gate) -> type[StrictRoute]:
    """A route class for `APIRouter(route_class=...)` whose requests pass `gates` before their body is read."""
    return type("GatedRoute", (StrictRoute,), {"gates": gates})


class _Parsed(Request):
    """A request whose body has been read and understood."""

    value: Any = None
    text: bytes = b""

    async def body(self) -> bytes:
        return self.text

    async def json(self) -> Any:
        return self.value


async def _parsed(request: Request) -> Request:
    settings: ServerSettings = request.app.state.server.settings
    _require_json(request.headers.get("content-type"), request.headers.get("content-encoding"))
    parsed = _Parsed(request.scope, request.receive)
    try:
        parsed.text = b"".join([part async for part in request.stream()])
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request had arrived", code="client_closed_request") from None
    parsed.value = read_json(
        parsed.text, max_bytes=settings.max_body_bytes, max_depth=settings.max_json_depth,
        max_items=settings.max_json_items,
    )  # fmt: skip
    return parsed


def _require_json(content_type: str | None, encoding: str | None) -> None:
    kind, _, rest = (content_type or "").partition(";")
    charset = rest.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise ApiError(415, "the body must be JSON in UTF-8: send Content-Type: application/json", code="content_type")
    if encoding not in (None, "", "identity"):
        raise ApiError(415, "the body must not be compressed: send no Content-Encoding", code="content_encoding")


def read_json(body: bytes, *, max_bytes: int, max_depth: int, max_items: int) -> Any:
    """The value of a JSON text. ApiError 400 or 413 for what is none, is too large, or could be read in two ways.

    Refused: a byte order mark, bytes that are no UTF-8, NaN and infinities (also 1e999), integers beyond 64 bits,
    a key twice in one object, lone surrogates, anything after the value.
    """
    if len(body) > max_bytes:
        raise too_large(max_bytes)
    if not body.strip():
        raise _invalid("it is empty")
    if body.startswith(_BOM):
        raise _invalid("it begins with a byte order mark")
    _bound(body, max_depth, max_items)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is no UTF-8") from None
    zeros = body.translate(_DIGITS)
    value = _decode(text, _CAREFUL_DECODER if any(sign in zeros for sign in _SUSPICIOUS) else _DECODER)
    if b"\\ud" in body or b"\\uD" in body:
        _refuse_surrogates(value)
    return value


def too_large(max_bytes: int) -> ApiError:
    """The answer to a body of more than `max_bytes`."""
    return ApiError(413, f"the body is larger than {max_bytes} bytes, the limit", code="request_too_large")


def _decode(text: str, decoder: JSONDecoder) -> Any:
    try:
        return decoder.decode(text)
    except JSONDecodeError as error:
        message = f"{error.msg[0].lower()}{error.msg[1:]}"
        raise _invalid(f"{message}, at line {error.lineno} column {error.colno}") from None
    except (ValueError, RecursionError):  # an integer of more digits than Python reads
        raise _invalid("a number or a nesting is too large to be read") from None


def _bound(body: bytes, max_depth: int, max_items: int) -> None:
    """Refuse what is nested too deep or has too many values, before anything is built of it."""
    opened = body.count(b"[") + body.count(b"{")
    if opened <= max_depth and opened + body.count(b",") + body.count(b":") < max_items:
        return
    bare = _STRINGS.sub(b"", body)  # what is left in strings does not count
    opened = bare.count(b"[") + bare.count(b"{")
    if opened + bare.count(b",") + bare.count(b":") >= max_items:
        raise ApiError(413, f"the body has more than {max_items} values, the limit", code="request_too_large")
    if opened > max_depth:
        brackets = bare.translate(None, _NOT_BRACKETS)
        if max(accumulate(map(_STEPS.__getitem__, brackets))) > max_depth:
            raise _invalid(f"it is nested deeper than {max_depth}, the limit")


def _refuse_surrogates(value: Any) -> None:
    try:
        dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _invalid("it has half of a surrogate pair, which is no character") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise ApiError(413, f"an object has more than {_MAX_KEYS} keys, the limit", code="request_too_large")
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _invalid(f"key {twice[:64]!r} is there twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _invalid(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _invalid(f"number {text[:32]} is beyond the range of a double")
    return value


def _bounded(text: str) -> int:
    value = int(text) if len(text) <= 20 else _MAX_INTEGER + 1
    if not -_MAX_INTEGER - 1 <= value <= _MAX_INTEGER:
        raise _invalid(f"integer {text[:32]}{'...' * (len(text) > 32)} does not fit into 64 bits")
    return value


_DECODER = JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
# A hook for each number makes long lists of them slow: only where one may be out of range.
_CAREFUL_DECODER = JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded
)


def _invalid(why: str) -> ApiError:
    return ApiError(400, f"the body is no valid JSON: {why}", code="invalid_json")
