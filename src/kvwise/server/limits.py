"""Around every request, as plain ASGI: its id, the size of its body, the time it has to arrive, and the last resort."""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvwise.server.errors import ApiError
from kvwise.server.settings import ServerSettings
from kvwise.server.strict import too_large

_log = logging.getLogger(__name__)
_CLIENT_ID = re.compile(rb"[!-~]{1,128}")


class Limits:
    """Wraps an app. The request's id is `request.state.request_id`, and `x-request-id` of every answer.

    A body that is too large or too slow makes `receive` raise the ApiError that the app's handlers answer with.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        try:
            await self.app(scope, self._bounded(scope, receive), answer.send)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not answer.complete:
                raise  # the connection is closed: the client sees an answer that is cut off, not one that ends well

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        limit = self.settings.max_body_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), None)
        deadline = asyncio.get_running_loop().time() + self.settings.request_timeout_s
        size, whole = int(declared) if declared is not None and declared.isdigit() else 0, False
        received = 0

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()
            if size > limit:
                raise too_large(limit)
            message = await _by(deadline, receive, self.settings.request_timeout_s)
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > limit:
                raise too_large(limit)
            return message

        return bounded


async def _by(deadline: float, receive: Callable[[], "asyncio.Future[Message]"] | Receive, seconds: float) -> Message:
    try:
        async with asyncio.timeout_at(deadline):
            return await receive()
    except TimeoutError:
        raise ApiError(408, f"the request has not arrived within {seconds:g} s", code="request_timeout") from None


class _Answer:
    """Passes an answer on, with the request's id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)


def _request_id(scope: Scope) -> str:
    """What the client says, if it is short and plain; else one of ours."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _CLIENT_ID.fullmatch(given[0]):
        return str(given[0].decode("ascii"))
    return new_request_id()


def new_request_id() -> str:
    """An id that nobody else has."""
    return f"req-{secrets.token_hex(12)}"
