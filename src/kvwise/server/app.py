"""The ASGI application: every module's routes, errors as one envelope, and the wrapper around every request."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from kvwise import __version__
from kvwise.core.errors import KvwiseError
from kvwise.server import health
from kvwise.server.admin import routes as admin
from kvwise.server.api import chat, completions, model_routes, tokenize
from kvwise.server.context import Server
from kvwise.server.errors import INVALID, NOT_FOUND, ApiError, as_api_error
from kvwise.server.faults import as_fault
from kvwise.server.limits import Limits
from kvwise.server.live import routes as live
from kvwise.server.observing import metrics
from kvwise.server.openapi import document, locked_paths

_MODULES = (chat, completions, health, model_routes, tokenize, metrics, admin, live)  # the router asks in this order


class App(FastAPI):
    """FastAPI with kvwise's routes, errors, limits and document."""

    def __init__(self, server: Server) -> None:
        super().__init__(
            title="kvwise", version=__version__, description="An OpenAI-compatible server whose KV cache can be seen.",
            docs_url=None, redoc_url=None, redirect_slashes=False,
            exception_handlers={
                KvwiseError: _answer_error, RequestValidationError: _answer_fault, HTTPException: _answer_http,
                Exception: _answer_error,
            },
        )  # fmt: skip
        self.state.server = server
        self._server = server
        self._routers = [module.routes(server) for module in _MODULES]
        for router in self._routers:
            self.include_router(router)

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette's, within ours: so that each answer, also to what nobody foresaw, has the request's id."""
        return Limits(super().build_middleware_stack(), self._server.settings)

    def methods_at(self, scope: Scope) -> set[str]:
        """The methods of all routes that have a request's path."""
        routes = [one for router in self._routers for one in router.routes if isinstance(one, Route)]
        return {method for one in routes if one.matches(scope)[0] is not Match.NONE for method in one.methods or ()}

    def openapi(self) -> dict[str, Any]:
        """The document at /openapi.json."""
        if self.openapi_schema is None:
            self.openapi_schema = document(self, locked_paths(self._routers, keys=self._server.tenants.has_keys))
        return self.openapi_schema


def create_app(server: Server) -> App:
    """The application of a server."""
    return App(server)


def envelope(error: Exception) -> JSONResponse:
    """The answer that an error is."""
    answer = as_api_error(error)
    return JSONResponse(answer.body, status_code=answer.status, headers=answer.headers)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    return envelope(error)


async def _answer_fault(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return envelope(as_fault(error.errors(), error.body))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """What Starlette's router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    known = {
        404: ("there is no such route; /openapi.json lists those there are", NOT_FOUND, "route_not_found"),
        405: ("this route does not take this method; see Allow", INVALID, "method_not_allowed"),
    }
    message, kind, code = known.get(error.status_code, (error.detail, INVALID, None))
    headers = dict(error.headers or {})
    if "Allow" in headers:  # that of the first route with this path; the others have methods too
        headers["Allow"] = ", ".join(sorted({headers["Allow"], *request.app.methods_at(request.scope)}))
    return envelope(ApiError(error.status_code, message, type=kind, code=code, headers=headers))
