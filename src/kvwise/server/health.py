"""`/health`: may requests be sent here? `/version`: of what?"""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from kvwise import __version__
from kvwise.engine.service import State
from kvwise.server.context import Server
from kvwise.server.strict import StrictRoute

HEALTH = "/health"


def routes(server: Server) -> APIRouter:
    """Both need no key."""
    router = APIRouter(route_class=StrictRoute, tags=["health"])

    @router.get(HEALTH, summary="Whether requests are served")
    async def health() -> JSONResponse:
        """200 with `{"status": "ready"}`; else 503 with what the server is doing: warming, draining, stuck."""
        return health_answer(server.service.health)

    @router.get("/version", summary="Version of the server")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return router


def health_answer(state: State) -> JSONResponse:
    """What `/health` says in a state."""
    if state is State.READY:
        return JSONResponse({"status": state})
    return JSONResponse({"status": state}, status_code=503, headers={"Retry-After": "5"})
