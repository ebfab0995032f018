"""The OpenAPI document: what FastAPI knows, with our errors in place of FastAPI's, and the key that is asked for."""

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from kvwise.server.strict import StrictRoute

_ERRORS = {
    "400": "The request cannot be served as it is.",
    "401": "No key, or not the right one.",
    "403": "The key does not allow this.",
    "404": "There is no such thing.",
    "429": "No room, or over a quota: try again after `Retry-After` seconds.",
    "500": "The server's fault.",
    "503": "The server takes no requests now: try again after `Retry-After` seconds.",
}
_BODY_ERRORS = {
    "408": "The request did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON in UTF-8.",
}
_ENVELOPE: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FASTAPIS = ("HTTPValidationError", "ValidationError")  # never sent
_METHODS = ("get", "post", "put", "patch", "delete")
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


def locked_paths(routers: Iterable[APIRouter], *, keys: bool) -> set[str]:
    """Paths that ask for a key: those whose routes have gates, if there are keys, and the administration's always."""
    routes = [route for router in routers for route in router.routes]
    gated = {route.path for route in routes if isinstance(route, StrictRoute) and route.gates}
    return {path for path in gated if keys or path.startswith("/admin")}


def document(app: FastAPI, locked: set[str]) -> dict[str, Any]:
    """The document of an app; the paths in `locked` ask for a key."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FASTAPIS:
        schemas.pop(name, None)
    schemas["Error"] = _ENVELOPE
    for path, item in found.get("paths", {}).items():
        for method in _METHODS:
            if method in item:
                _complete(item[method])
                if path in locked:
                    item[method]["security"] = [{"key": []}]
    if locked:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _complete(operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    errors = _ERRORS | _BODY_ERRORS if "requestBody" in operation else _ERRORS
    for status, description in errors.items():
        answer = answers.setdefault(status, {"description": description})
        answer.setdefault("content", {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}})
        if status in ("429", "503"):
            answer.setdefault("headers", _RETRY_AFTER)
