"""Checks before a request's body is read: who asks, and whether there is room. A refusal costs microseconds.

    router = APIRouter(route_class=gated(known(server), room(server)))  # in a module's `routes(server)`

`request.state.tenant` is the tenant then. They run on the route that was chosen; nothing looks at hosts or raw paths.
"""

from fastapi import Request

from kvwise.server.context import Server
from kvwise.server.strict import Gate


def known(server: Server) -> Gate:
    """Only for who may use the model: 401 otherwise."""

    async def gate(request: Request) -> None:
        request.state.tenant = server.tenants.authenticate(request)

    return gate


def room(server: Server) -> Gate:
    """Only while the service takes requests, its queue has room and the tenant's quota too: 429 or 503 otherwise.

    Behind `known`.
    """

    async def gate(request: Request) -> None:
        server.service.require_room()
        server.tenants.require_quota(request.state.tenant)

    return gate


def admin(server: Server) -> Gate:
    """Only with the key of the administration: 401 otherwise."""

    async def gate(request: Request) -> None:
        server.tenants.require_admin(request)

    return gate
