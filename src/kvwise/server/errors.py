"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`, on every route."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from kvwise.core.errors import CapacityError, KvwiseError, UsageError
from kvwise.engine.service import Overloaded, Unavailable

INVALID, AUTHENTICATION, PERMISSION = "invalid_request_error", "authentication_error", "permission_error"
NOT_FOUND, RATE_LIMIT, SERVER = "not_found_error", "rate_limit_error", "server_error"


class ApiError(KvwiseError):
    """An answer that is an error: its HTTP status, and what the envelope says."""

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """What an error of the engine's means to a client; what nobody foresaw is a 500 that tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(
            429, str(error), type=RATE_LIMIT, code="overloaded", headers={"Retry-After": _seconds(error.retry_after_s)}
        )
    if isinstance(error, Unavailable):
        headers = {"Retry-After": _seconds(error.retry_after_s)}
        return ApiError(503, str(error), type=SERVER, code=f"server_{error.state}", headers=headers)
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed on this request; its log says why", type=SERVER, code="internal_error")


def _seconds(seconds: float) -> str:
    return str(max(1, ceil(seconds)))
