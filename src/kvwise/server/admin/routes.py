"""`/admin`: sessions, pins, warm-up, purge, figures and the strategy of a running server, behind a key of its own."""

from typing import Annotated

from fastapi import APIRouter, Query

from kvwise.server.admin.operations import Administration
from kvwise.server.admin.schema import (
    ChangedAnswer,
    DrainAnswer,
    DrainRequest,
    PinRequest,
    PromptQuery,
    PurgeAnswer,
    PurgeRequest,
    ResidenceAnswer,
    SessionAnswer,
    SessionQuery,
    SessionRequest,
    SessionsAnswer,
    StatsAnswer,
    StrategyAnswer,
    StrategyRequest,
    WarmAnswer,
    WarmRequest,
)
from kvwise.server.context import Server
from kvwise.server.gates import admin
from kvwise.server.strict import gated


def routes(server: Server) -> APIRouter:
    """The administration; nothing at all without a key for it."""
    if not server.tenants.has_admin:
        return APIRouter()
    router = APIRouter(prefix="/admin", route_class=gated(admin(server)), tags=["administration"])
    do = Administration(server)
    for add in (_look, _keep, _sessions, _service):
        add(router, do)
    return router


def _look(router: APIRouter, do: Administration) -> None:
    @router.get("/stats", summary="Figures of engines and tenants")
    async def stats() -> StatsAnswer:
        return await do.stats()

    @router.post("/residence", summary="Where a prompt's KV is")
    async def residence(body: PromptQuery) -> ResidenceAnswer:
        """Counts full blocks. A POST, so that no prompt stands in an address."""
        return await do.residence(body)


def _keep(router: APIRouter, do: Administration) -> None:
    @router.post("/warm", summary="Compute prompts and keep their KV")
    async def warm(body: WarmRequest) -> WarmAnswer:
        """Answers when all are computed, and says of each whether it is resident."""
        return await do.warm(body)

    @router.post("/pin", summary="Keep a prompt's KV from eviction")
    async def pin(body: PinRequest) -> ChangedAnswer:
        """What is stored of it now, in every tier. Expiry and purge end a pin."""
        return await do.pin(body)

    @router.post("/unpin", summary="End the pins of a prompt's KV")
    async def unpin(body: PromptQuery) -> ChangedAnswer:
        return await do.unpin(body)

    @router.post("/purge", summary="Forget KV in every tier, and prove it")
    async def purge(body: PurgeRequest) -> PurgeAnswer:
        """Bytes are overwritten where the medium allows it; look-ups afterwards are part of the answer."""
        return await do.purge(body)

    @router.post("/clear", summary="Empty the device's cache")
    async def clear() -> ChangedAnswer:
        """Nothing on the device is found any more; running requests go on, and tiers below keep what they have."""
        return await do.clear()


def _sessions(router: APIRouter, do: Administration) -> None:
    @router.get("/sessions", summary="Sessions that are remembered")
    async def sessions() -> SessionsAnswer:
        return await do.sessions()

    @router.post("/sessions/{session:path}", summary="Open a session")
    async def open_session(session: str, body: SessionRequest) -> SessionAnswer:
        """Its times to live are the default of its requests, and close it when they are over."""
        return await do.open_session(session, body)

    @router.delete("/sessions/{session:path}", summary="Close a session, and purge it if asked to")
    async def end_session(session: str, query: Annotated[SessionQuery, Query()]) -> SessionAnswer:
        """Closing drops its claims; purging also ends its requests and forgets what only it holds, in every tier."""
        return await do.end_session(session, query)


def _service(router: APIRouter, do: Administration) -> None:
    @router.get("/strategy", summary="The strategies that are served")
    async def strategy() -> StrategyAnswer:
        return do.strategy()

    @router.post("/strategy", summary="Make a strategy the default")
    async def switch(body: StrategyRequest) -> StrategyAnswer:
        """Running requests end first, new ones get a 503 meanwhile. What the device held is gone if the engine is new.

        409, and nothing has changed, if they do not end in time.
        """
        return await do.switch(body)

    @router.post("/drain", summary="Take no more requests, and wait for those there are")
    async def drain(body: DrainRequest) -> DrainAnswer:
        """The server serves nothing afterwards: stop it. What has not ended in time is aborted."""
        return await do.drain(body)
