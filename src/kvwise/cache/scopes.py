"""Scopes: who may reuse the KV of a request, as the salt of its keys."""

import json
from enum import StrEnum

from kvwise.core.errors import UsageError


class Scope(StrEnum):
    """Who shares, from nobody to everybody."""

    REQUEST = "request"
    SESSION = "session"
    TENANT = "tenant"
    GLOBAL = "global"


def effective_salt(scope: Scope, tenant: str = "", session: str = "", narrow: str = "") -> str | None:
    """The salt under which exactly those of `scope` meet; None: nothing is published, nothing is hit.

    A tenant's salt is its name, so that a bare `salt=` of a request is tenant scope; the tenant without a name shares
    with everybody. Names that begin with a bracket are spelled as JSON like sessions are: no two owners share a salt.
    `narrow` parts those of one scope further: only equal ones meet.
    UsageError if a session is needed and missing.
    """
    if scope is Scope.REQUEST:
        return None
    if scope is Scope.GLOBAL:
        return json.dumps(["global", narrow]) if narrow else ""
    if scope is Scope.TENANT:
        if narrow:
            return json.dumps(["tenant", tenant, narrow])
        return json.dumps(["tenant", tenant]) if tenant.startswith("[") else tenant
    if not session:
        raise UsageError("scope 'session' needs a session: name one, or choose scope request, tenant or global")
    return json.dumps(["session", tenant, session, *([narrow] if narrow else [])])
