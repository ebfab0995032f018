"""A tiny OpenAI server: it answers as each request's script says, and remembers what it was asked."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

DONE = b"data: [DONE]\n\n"


@dataclass
class Reply:
    """What one request gets: its texts as chunks, in pieces as `cut` says."""

    texts: tuple[str, ...] = ("a", "b", "c")
    finish: str | None = "length"
    usage: bool = True
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # instead of all that
    drop: bool = False  # the connection, in the middle
    hold: bool = False  # the end, until the test is over


def stream(reply: Reply, *, is_chat: bool, num_prompt: int = 7, cached: int = 2) -> bytes:
    """The bytes of an answer as OpenAI streams it."""
    if reply.raw is not None:
        return reply.raw

    def choice(text: str, end: str | None) -> dict[str, Any]:
        said = {"delta": {"content": text} if text else {}} if is_chat else {"text": text}
        return {"index": 0, **said, "finish_reason": end}

    chunks: list[dict[str, Any]] = []
    if is_chat:
        chunks.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    chunks += [{"choices": [choice(text, None)]} for text in reply.texts]
    if reply.finish is not None:
        chunks.append({"choices": [choice("", reply.finish)]})
    if reply.usage:
        usage = {"prompt_tokens": num_prompt, "completion_tokens": len(reply.texts)}
        chunks.append({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}}})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + DONE


class FakeServer:
    """Served on a thread of its own; `reply` may be changed, and is asked with the number of the request."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.reply: Callable[[int], Reply] = lambda number: Reply()
        self.models_status = 200
        self.models_failures = 0  # so many times 503 first
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        reply = self.reply(len(self.bodies) - 1)
        if reply.status != 200:
            error = {"error": {"message": "no room here", "type": "x", "param": None, "code": None}}
            return web.json_response(error, status=reply.status, headers=reply.headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        whole = stream(reply, is_chat=request.path.endswith("chat/completions"))
        await response.write(whole[: len(whole) // 2])
        if reply.hold:
            await self._over.wait()
        if reply.drop:
            assert request.transport is not None
            request.transport.close()
            return response
        await response.write(whole[len(whole) // 2 :])
        return response

    async def _models(self, request: web.Request) -> web.Response:
        if self.models_failures:
            self.models_failures -= 1
            return web.Response(status=503)
        return web.json_response({"data": [{"id": "fake-model"}]}, status=self.models_status)

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        """Listen on a free port until the block ends."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/completions", self._post)
        app.router.add_post("/v1/chat/completions", self._post)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app, shutdown_timeout=1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._over.set)
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()
