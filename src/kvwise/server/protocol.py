"""One connection: uvicorn's HTTP protocol, with the deadlines and bounds that it leaves to a proxy."""

import asyncio
import json
import socket
import struct
from functools import partial
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from kvwise.server.errors import SERVER, ApiError
from kvwise.server.limits import new_request_id
from kvwise.server.settings import ServerSettings

_GRACE_S = 1.0  # the app's own deadlines come first: it has a better answer, and knows what to tell of a slow reader
_DISCARD = 4  # so many times the largest body are read and thrown away after an answer that did not wait for it


def guarded(settings: ServerSettings) -> Any:
    """The protocol class for uvicorn's `http`."""
    return partial(GuardedProtocol, settings)


class GuardedProtocol(HttpToolsProtocol):
    """Adds: time for a head and a body to arrive and for an answer to be taken; size of a head; connections.

    What it refuses it answers with the envelope, as the app would, and closes.
    """

    def __init__(
        self, settings: ServerSettings, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self.settings = settings
        self._arrival: asyncio.TimerHandle | None = None  # when what arrives must be whole
        self._departure: asyncio.TimerHandle | None = None  # when what was written must have been taken
        self._in_head = self._in_body = False
        self._head_bytes = 0  # of the head that is arriving: what the parser has told of it
        self._fed_bytes = 0  # likewise: what the parser was fed
        self._unread_bytes = 0  # of a body that has been answered already
        self._refusal: ApiError | None = None  # why the parser was stopped

    # -- what arrives -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there; it has to say something in time."""
        super().connection_made(transport)  # type: ignore[arg-type]
        # asyncio does so only where the listener names TCP; else each answer waits 40 ms for an acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(
                ApiError(
                    503, f"{self.settings.max_connections} connections are open, and no more may be", type=SERVER,
                    code="too_many_connections", headers={"Retry-After": "1"},
                )
            )  # fmt: skip
        else:
            self._expect(self.settings.request_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: of a head, of a body, or of a body that nobody wants any more."""
        if self.transport.is_closing():
            return
        began_before = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and began_before:
            # By the parser's news alone an endless name would be gathered unseen.
            self._fed_bytes += len(data)
            if self._fed_bytes > self.settings.max_header_bytes:
                self._refuse(self._head_too_large())
        elif self._in_body and self.cycle.response_complete:
            self._unread_bytes += len(data)
            if self._unread_bytes > _DISCARD * self.settings.max_body_bytes:
                self._cut()
        elif self._arrival is None and not self._busy:  # line ends between two messages
            self._expect(self.settings.request_timeout_s)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._fed_bytes = self._unread_bytes = 0
        self._expect(self.settings.request_timeout_s)

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        """The head is whole; its body, if there is one, has to follow."""
        self._in_head, self._in_body = False, True
        super().on_headers_complete()
        self._expect(self.settings.request_timeout_s + _GRACE_S)

    def on_message_complete(self) -> None:
        """The request is whole: from here on the app has all the time it wants."""
        super().on_message_complete()
        self._in_body = False
        self._expect_nothing()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.settings.max_header_bytes:
            self._refusal = self._head_too_large()
            raise ValueError("the head is too large")  # the parser stops and calls `send_400_response`

    def _head_too_large(self) -> ApiError:
        limit = self.settings.max_header_bytes
        return ApiError(431, f"the request line and headers are larger than {limit} bytes", code="headers_too_large")

    # -- time ---------------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        """Whether an answer is being made."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self, seconds: float) -> None:
        self._expect_nothing()
        self._arrival = self.loop.call_later(seconds, self._too_slow, seconds)

    def _expect_nothing(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _too_slow(self, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self.flow.read_paused:  # it is we who do not read: the app is busy, or with the request before this one
            self._expect(seconds)
            return
        self._refuse(
            ApiError(408, f"the request has not arrived within {self.settings.request_timeout_s:g} s",
                     code="request_timeout")
        )  # fmt: skip

    def pause_writing(self) -> None:
        """The client does not take what is written: for a while that is well."""
        super().pause_writing()
        self._depart()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None

    def on_response_complete(self) -> None:
        """An answer was written; if the connection ends with it, that must not last."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._depart()

    def _depart(self) -> None:
        if self._departure is None:
            self._departure = self.loop.call_later(self.settings.slow_reader_s + _GRACE_S, self._cut)

    def _cut(self) -> None:
        """End the connection with a reset, so that the kernel does not keep what nobody takes."""
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._expect_nothing()
        if self._departure is not None:
            self._departure.cancel()

    # -- refusing -----------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped: what arrives is no HTTP, or what a callback has refused."""
        refusal = self._refusal or ApiError(400, "this is no valid HTTP request", code="invalid_http")
        self._refuse(refusal)

    def _refuse(self, error: ApiError) -> None:
        """Answer and close. In the midst of another answer there is nothing to be said: only close."""
        self._expect_nothing()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = json.dumps(error.body).encode()
        lines = [
            STATUS_LINE[error.status],
            *(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers),
            *(f"{name}: {value}\r\n".encode() for name, value in error.headers.items()),
            f"x-request-id: {new_request_id()}\r\ncontent-type: application/json\r\n".encode(),
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode(),
        ]
        self.transport.write(b"".join([*lines, body]))
        self.transport.close()
        self._depart()
