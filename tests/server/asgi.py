"""Clients that can leave, or stop reading, at any moment, and an engine that steps only when it is told to."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from kvwise.server.app import create_app
from kvwise.server.context import Server

PATIENCE_S = 30  # until a test that waits for something that never comes gives up


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    """Over a socket. Without the certificates that httpx.post would read each time."""
    with httpx.Client(verify=False, trust_env=False, timeout=60) as client:
        return client.post(url, json=body, headers=headers)


class Asked:
    """One request to an ASGI app without a socket."""

    def __init__(self, app: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()  # cleared: nothing is taken
        self.reads.set()
        self._left = asyncio.Event()
        self._progress = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in given.items()], "server": ("x", 1), "client": ("y", 2),
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
        self._progress.set()

    def leave(self) -> None:
        self._left.set()

    async def done(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.task

    async def until(self, holds: Callable[["Asked"], bool]) -> None:
        """Wait for what the app sends until something holds of it."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds(self):
                self._progress.clear()
                await self._progress.wait()

    @property
    def status(self) -> int:
        return self.sent[0]["status"] if self.sent else 0

    @property
    def complete(self) -> bool:
        last = self.sent[-1] if self.sent else {}
        return last.get("type") == "http.response.body" and not last.get("more_body", False)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What the stream said; [DONE] as it is."""
        lines = [line for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class Pace:
    """Makes an engine wait before each step until that step is allowed."""

    def __init__(self, engine: Any) -> None:
        self._step = engine.step
        self._may = threading.Condition()
        self._allowed = 0.0
        self.taken = 0
        self.stands = False  # a step waits to be allowed: commands to the engine wait too
        engine.step = self._paced

    def _paced(self) -> Any:
        with self._may:
            self.stands = True
            self._may.wait_for(lambda: self.taken < self._allowed)
            self.stands = False
            self.taken += 1
        return self._step()

    def allow(self, steps: float) -> None:
        with self._may:
            self._allowed = max(self._allowed, self.taken) + steps
            self._may.notify_all()


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Any]:
    """The app of a server whose service is ready, on this event loop."""
    await server.service.start()
    server.service.ready()
    try:
        yield create_app(server)
    finally:
        await server.service.close()


async def pace(server: Server) -> Pace:
    """Step by step from now on; nothing may be running."""
    return await server.service.call(Pace)


async def settled(server: Server) -> tuple[int, int]:
    """Wait until nothing runs; the pool must be sound and hold nothing. (Free blocks, cached blocks.)"""

    def look(engine: Any) -> tuple[int, int]:
        assert not engine.has_unfinished()
        engine.memory.cache.check()
        usage = engine.memory.cache.usage()
        assert usage.num_referenced == 0
        assert usage.num_free + usage.num_cached == usage.num_blocks
        return usage.num_free, usage.num_cached

    async with asyncio.timeout(PATIENCE_S):
        while server.service.streams():
            await asyncio.sleep(0.001)  # without a pause the engine's thread would hardly get the interpreter's lock
        return await server.service.call(look)
