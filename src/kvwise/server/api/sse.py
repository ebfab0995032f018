"""Answers as a stream of server-sent events, pure ASGI: each send has a deadline, and a leaving client is seen."""

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, closing
from typing import Any, Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from kvwise.engine.stream import News
from kvwise.server.api.deadline import Patience
from kvwise.server.api.generation import GONE, Generation
from kvwise.server.api.usage import usage
from kvwise.server.errors import as_api_error

_log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or `[DONE]`."}},
}
STREAM = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}  # for the OpenAPI document


class Format(Protocol):
    """How one kind of answer writes choices of a chunk, as JSON."""

    def opening(self, index: int) -> str | None:
        """The first choice of a sample, before anything is generated; None if there is none."""
        ...

    def piece(self, index: int, news: News) -> str | None:
        """What was generated; None if there is nothing to show of it."""
        ...

    def closing(self, index: int, end: News) -> str:
        """The last choice of a sample, which says why it ended."""
        ...


class Framing:
    """Chunks of one answer. What they have in common is made into bytes once."""

    def __init__(self, head: Mapping[str, Any], *, include_usage: bool) -> None:
        text = json.dumps(head, separators=(",", ":"))[:-1]
        self._before = f'data: {text},"choices":['.encode()
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self.include_usage = include_usage

    def chunk(self, choice: str) -> bytes:
        """A chunk with one choice, given as JSON."""
        return self._before + choice.encode() + self._after

    def usage(self, figures: Mapping[str, Any]) -> bytes:
        """The chunk without choices that tells the usage."""
        return self._before + f'],"usage":{json.dumps(figures)}}}\n\n'.encode()


def dumps(value: object) -> str:
    """JSON in one line, ASCII only, so that no character of a text can end an event."""
    return json.dumps(value, separators=(",", ":"))


def nobody() -> Response:
    """The answer to a client that has left; nobody reads it."""
    return Response(status_code=GONE)


class EventStream(Response):
    """Writes a generation to its client. Owns it: when the answer ends, nothing of it runs any more."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, owned: AsyncExitStack, form: Format, framing: Framing, *, keep_alive_s: float,
        send_s: float,
    ) -> None:  # fmt: skip
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **generation.headers}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._generation = generation
        self._owned = owned
        self._form = form
        self._framing = framing
        self._keep_alive_s = keep_alive_s
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, from the first token on: what the order fails of before that is raised.

        A client that takes nothing for `send_s` is left without an end of its answer: it is cut off.
        """
        generation = self._generation
        async with self._owned:
            await generation.begun(self._keep_alive_s)
            if generation.disconnected:
                await nobody()(scope, receive, send)
                return
            try:
                generation.record.status = self.status_code
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                with closing(Patience(self._send_s)) as patience:
                    async with aclosing(self._events()) as events:
                        async for data in events:
                            with patience:
                                await send({"type": "http.response.body", "body": data, "more_body": True})
                if not generation.disconnected:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                generation.record.error = "slow_reader"
                _log.warning("request %s is cut off: its client reads nothing", generation.record.request_id)
            except OSError:  # the connection broke while it was written to
                generation.record.disconnected = True

    async def _events(self) -> AsyncGenerator[bytes]:
        """All that there is to send at one time, together."""
        form, framing, generation = self._form, self._framing, self._generation
        openings = [form.opening(index) for index in range(generation.num_samples)]
        data = b"".join(framing.chunk(one) for one in openings if one is not None)
        try:
            async for taken in generation.news(self._keep_alive_s):
                data += b"".join(self._chunks(index, news) for index, news in taken.items())
                if data or not taken:
                    yield data or KEEP_ALIVE
                    data = b""
                generation.hand_over(sum(len(news.token_ids) for news in taken.values()))
        except Exception as error:  # the answer has begun: its status cannot be changed any more
            answer = as_api_error(error)
            generation.record.error = answer.code or answer.type
            yield b"data: " + dumps(answer.body).encode() + b"\n\n"
            return
        if not generation.disconnected:
            end = framing.usage(usage(generation.streams, generation.firsts)) if framing.include_usage else b""
            yield end + DONE

    def _chunks(self, index: int, news: News) -> bytes:
        piece = self._form.piece(index, news)
        data = b"" if piece is None else self._framing.chunk(piece)
        if news.finish_reason is not None:
            data += self._framing.chunk(self._form.closing(index, news))
        return data
