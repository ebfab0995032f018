"""What pydantic says of a request, as one error that names the field, the value and the way out."""

from collections.abc import Mapping, Sequence
from reprlib import Repr
from typing import Any

from kvwise.server.errors import ApiError

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
_MAX_SHOWN = 60  # characters of a value


def as_fault(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The error 400 of a request that does not fit its schema: the fault that lies deepest, of those the first.

    A value that fits none of several types fails each of them; the one that came furthest is what was meant.
    """
    paths = [_path(error, body) for error in errors]
    best = max(range(len(errors)), key=lambda i: (len(paths[i]), -i))
    param, error = _joined(paths[best]), errors[best]
    code = _CODES.get(error["type"], "invalid_value")
    if not param:
        return ApiError(400, f"the body must be a JSON object: {_shown(body)} is none", code=code)
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code=code)
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not known here: leave it out", param=param, code=code)
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}".removeprefix("value error, ")
    return ApiError(400, f"{param}={_shown(error.get('input'))}: {message}", param=param, code=code)


def _path(error: Mapping[str, Any], body: Any) -> list[int | str]:
    """Where the fault lies, in keys of the body; pydantic also puts the names of a union's types there."""
    place, *parts = error["loc"]
    if place != "body":
        return [str(part) for part in parts]
    path: list[int | str] = []
    for number, part in enumerate(parts):
        if (isinstance(body, list) and isinstance(part, int)) or (isinstance(body, dict) and part in body):
            path.append(part)
            body = body[part]
        elif error["type"] == "missing" and number == len(parts) - 1:
            path.append(part)
    return path


def _joined(path: Sequence[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_SHOWN]}" for part in path)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    short = Repr()  # of a large value this writes only the beginning
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring = 2, 4, 4, _MAX_SHOWN
    text = short.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
