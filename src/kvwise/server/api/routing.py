"""The way into every route that generates: checks before the body is read, and a record from the first moment on."""

from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from kvwise.core.config import PRIORITY
from kvwise.core.errors import StrategyError
from kvwise.methods.catalogue import parse
from kvwise.server.api.generation import note_end
from kvwise.server.api.schema import GenerationRequest
from kvwise.server.context import Server
from kvwise.server.errors import NOT_FOUND, ApiError
from kvwise.server.faults import as_fault
from kvwise.server.gates import known, room
from kvwise.server.record import RequestRecord
from kvwise.server.strict import StrictRoute, gated
from kvwise.server.tenancy.tenants import Tenant


def generating(server: Server) -> type[StrictRoute]:
    """The class of routes that generate. `request.state.record` is the request's record then.

    A request that is refused, for whatever reason, ends its record: observers hear of it.
    """
    behind = gated(known(server), room(server))

    def get_route_handler(route: Any) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = behind.get_route_handler(route)

        async def recorded(request: Request) -> Response:
            record = request.state.record = _record(server, request)
            try:
                return await answer(request)
            except RequestValidationError as error:
                note_end(server, record, as_fault(error.errors(), error.body))
                raise
            except BaseException as error:
                note_end(server, record, error)
                raise

        return recorded

    return type("GeneratingRoute", (behind,), {"get_route_handler": get_route_handler})


def _record(server: Server, request: Request) -> RequestRecord:
    route = getattr(request.scope.get("route"), "path", "")
    return RequestRecord(
        request_id=getattr(request.state, "request_id", "") or new_id("req"),
        route=route, tenant="", model="", strategy="", streams=False, arrival=server.service.clock.now(),
        traceparent=request.headers.get("traceparent", "")[:128],
    )  # fmt: skip


def admit(server: Server, request: Request, body: GenerationRequest) -> RequestRecord:
    """Check what needs no tokens: the model's name, the strategy, counts. Fills in the request's record."""
    record: RequestRecord = request.state.record
    tenant: Tenant = request.state.tenant
    require_model(server, body.model)
    record.tenant, record.model, record.streams = tenant.name, body.model, bool(body.stream)
    record.user = body.user or ""
    if (body.n or 1) > server.settings.max_n:
        raise ApiError(400, f"n={body.n} is more than {server.settings.max_n}, the limit", param="n")
    if body.priority and server.service.config.scheduling_policy != PRIORITY:
        raise ApiError(
            400, f"priority={body.priority} means nothing here: the server does not schedule by priority",
            param="priority",
        )  # fmt: skip
    return record


def require_model(server: Server, name: str | None) -> None:
    """ApiError 404 unless that is a name of the model; None: nobody asked for one."""
    if name is not None and name not in server.model_names:
        raise ApiError(
            404, f"the model {name!r} is not served here; there is {', '.join(server.model_names)}", type=NOT_FOUND,
            param="model", code="model_not_found",
        )  # fmt: skip


def chosen_strategy(server: Server, tenant: Tenant, asked: str | None) -> str | None:
    """The strategy that a request asks for, as the server spells it; ApiError 400 if it has none such, 403 if the
    tenant may not choose it."""
    if asked is None:
        return None
    try:
        name = str(parse(asked))
    except StrategyError:
        name = asked
    if name not in server.service.strategies:
        served = ", ".join(server.service.strategies)
        raise ApiError(400, f"strategy {asked!r} is not served here; choose one of {served}", param="strategy")
    server.tenants.require_strategy(tenant, name)
    return name


def new_id(prefix: str) -> str:
    """An id that nobody else has."""
    return f"{prefix}-{uuid4().hex}"
