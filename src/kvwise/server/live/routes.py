"""The live view at `/`: a page without anything from elsewhere, its feed, and where a prompt's blocks are."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from kvwise.core.errors import UsageError
from kvwise.engine.service import State, Unavailable
from kvwise.server.api.fields import STRICT, TokenId
from kvwise.server.api.prompts import text_prompt
from kvwise.server.api.routing import chosen_strategy
from kvwise.server.context import Server
from kvwise.server.errors import AUTHENTICATION, ApiError
from kvwise.server.gates import known, room
from kvwise.server.live.feed import Audience, Feed, Viewer
from kvwise.server.live.figures import LiveFigures
from kvwise.server.live.look import holders, places
from kvwise.server.strict import Gate, gated

_log = logging.getLogger(__name__)
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = (
    "live.html", "live.css", "live.svg",
    "live.js", "live_feed.js", "live_map.js", "live_parts.js", "live_prompt.js", "live_view.js",
)  # fmt: skip
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class BlocksRequest(BaseModel):
    """A prompt as a completion would send it."""

    model_config = STRICT

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)]
    strategy: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class BlockRun(BaseModel):
    """Blocks that follow each other in one place."""

    place: Annotated[str, Field(description="device, the name of a tier, or none: to be computed.")]
    blocks: int


class BlocksAnswer(BaseModel):
    """Where the full blocks of a prompt are, in order."""

    tokens: int
    block_size: int
    blocks: int
    runs: list[BlockRun]


class HoldersAnswer(BaseModel):
    """Ids of the requests that hold a block, and how many others do."""

    requests: list[str]
    others: int


def routes(server: Server) -> APIRouter:
    """The page, its feed and its question; nothing where the settings have no live view."""
    router = APIRouter()
    if not server.settings.live:
        return router
    _add_files(router)
    router.include_router(_feed(server))
    router.include_router(_blocks(server))
    return router


def _add_files(router: APIRouter) -> None:
    """The page needs no key: it says nothing before it has asked for one."""
    package = files("kvwise.server.live")
    for name in _FILES:
        content = package.joinpath(name).read_bytes()
        kind = _KINDS[name.rpartition(".")[2]]
        path = "/" if name == "live.html" else f"/live/{name}"
        router.add_api_route(path, _file(content, kind), methods=["GET"], include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer


# -- the feed ---------------------------------------------------------------------------------------------------


def _feed(server: Server) -> APIRouter:
    ids = {tenant.name: tenant.id for tenant in server.tenants.tenants}
    figures = LiveFigures(server.service.clock, ids)
    server.observers.append(figures)
    feed = Feed(server, figures)
    router = APIRouter(route_class=gated(_watching(server)))

    @router.get("/live/events", include_in_schema=False)
    async def events(request: Request) -> Response:
        """Pictures of the server as server-sent events, at most two a second."""
        settings = server.settings
        return FeedAnswer(feed, request.state.audience, settings.sse_keep_alive_s, settings.slow_reader_s)

    @router.get("/live/holders", include_in_schema=False)
    async def held_by(
        request: Request, strategy: Annotated[str, Query(max_length=512)], block: Annotated[int, Query(ge=0)]
    ) -> HoldersAnswer:
        """Which requests hold a block: those that the viewer may see by name."""
        service, audience = server.service, request.state.audience
        if service.health is not State.READY:
            raise Unavailable(service.health, 1.0)
        names = await service.call(lambda engine: holders(engine, block), strategy)
        seen = {one.request_id for one in service.streams() if audience in (None, one.tenant)}
        mine = [name for name in names if name in seen]
        return HoldersAnswer(requests=mine, others=len(names) - len(mine))

    return router


def _watching(server: Server) -> Gate:
    """Who may watch: the administrator where there is one, else tenants, each its own requests; else everybody."""

    async def gate(request: Request) -> None:
        audience: Audience = None
        if server.tenants.has_admin:
            try:
                server.tenants.require_admin(request)
            except ApiError:
                raise ApiError(
                    401, "the live view opens with the key of the administration", type=AUTHENTICATION,
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                ) from None  # fmt: skip
        elif server.tenants.has_keys:
            audience = server.tenants.authenticate(request).id
        request.state.audience = audience

    return gate


class FeedAnswer(Response):
    """Writes the feed to one viewer, until it leaves, takes nothing for `send_s`, or the server ends.

    ApiError 503, before anything is written, if too many watch.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, audience: Audience, keep_alive_s: float, send_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed
        self._audience = audience
        self._keep_alive_s = keep_alive_s
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        viewer = self._feed.join(self._audience)
        writing = asyncio.create_task(self._write(viewer, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.leave(viewer)
            for task in (writing, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _write(self, viewer: Viewer, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(viewer.events(self._keep_alive_s)) as events:
                async for data in events:
                    async with asyncio.timeout(self._send_s):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _log.warning("a viewer of the live view is cut off: it reads nothing")
        except OSError:  # the connection broke while it was written to
            return


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# -- the question -----------------------------------------------------------------------------------------------


def _blocks(server: Server) -> APIRouter:
    router = APIRouter(route_class=gated(known(server), room(server)), tags=["live view"])

    @router.post("/live/blocks", summary="Where a prompt's KV is, for the tenant that asks")
    async def blocks(request: Request, body: BlocksRequest) -> BlocksAnswer:
        """Counts full blocks, in order, as a completion of the same tenant would find them now."""
        service, tenant = server.service, request.state.tenant
        strategy = chosen_strategy(server, tenant, body.strategy)
        tokens = (await text_prompt(server, body.prompt)).tokens if isinstance(body.prompt, str) else body.prompt
        if (largest := max(tokens, default=0)) >= service.loaded.vocab_size:
            raise UsageError(f"token id {largest} is outside the vocabulary of {service.loaded.vocab_size} tokens")
        count, runs = await service.call(
            lambda engine: places(engine, tokens, tenant.id, body.cache_salt or ""), strategy
        )
        found = [BlockRun(place=place, blocks=number) for place, number in runs]
        return BlocksAnswer(tokens=len(tokens), block_size=service.config.block_size, blocks=count, runs=found)

    return router
