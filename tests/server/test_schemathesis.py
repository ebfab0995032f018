"""Requests made up from the OpenAPI document, good and bad ones: no 5xx, no hang, and answers as the document says."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from kvwise.models.loaded import LoadedModel
from tests.server.asgi import settled
from tests.server.conftest import MODEL, Served, key_file, make_server, private, serving

KEY, ADMIN = "sk-a-tenant", "sk-the-administrator"
PATIENCE_S = 30  # of one call: none may hang
SMALL: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 16}  # so that no answer is long
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
    "ignored_auth",
)  # fmt: skip


def told(served: Served, tenants: list[str]) -> dict[str, Any]:
    """The document, with names that this server knows: else nearly everything would be refused for a made-up one."""
    document = copy.deepcopy(served.app.openapi())
    known = {"model": [MODEL], "strategy": served.service.strategies, "tenant": tenants}
    for schema in document["components"]["schemas"].values():
        for name in known.keys() & schema.get("properties", {}).keys():
            nullable = '"null"' in json.dumps(schema["properties"][name])
            schema["properties"][name] = {"enum": [*known[name], *([None] if nullable else [])]}
    return document


def config(served: Served, key: str, admin: str) -> SchemathesisConfig:
    """As in schemathesis.toml: every phase but the one that follows links; coverage, the longest, only with keys."""
    administration = {"include-path-regex": "^/(admin|metrics)", "headers": {"Authorization": f"Bearer {admin}"}}
    return SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "base-url": served.url,
            "request-timeout": PATIENCE_S,
            "continue-on-failure": True,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "operations": [administration] if admin else [],
            "output": {"sanitization": {"enabled": False}},
            "generation": {"deterministic": True, "database": "none", "max-examples": 8, "no-shrink": True},
            "checks": {"enabled": False} | {name: {"enabled": True} for name in CHECKS},
            "phases": {"stateful": {"enabled": False}, "coverage": {"enabled": bool(key)}},
        }
    )


def run(document: dict[str, Any], settings: SchemathesisConfig) -> tuple[dict[str, Counter[int]], list[str]]:
    """The statuses of each route's answers, and what was wrong."""
    statuses: dict[str, Counter[int]] = {}
    wrong: list[str] = []
    for event in from_schema(schemathesis.openapi.from_dict(document, config=settings)).execute():
        if isinstance(event, events.ScenarioFinished):
            answers = [one.response for one in event.recorder.interactions.values()]
            wrong += [f"{event.label}: no answer" for one in answers if one is None]
            statuses.setdefault(event.label or "", Counter()).update(one.status_code for one in answers if one)
            failed = [one.failure_info for nodes in event.recorder.checks.values() for one in nodes if one.failure_info]
            wrong += [f"{event.label}: {one.failure.title}: {one.failure.message}: {one.code_sample}" for one in failed]
        elif isinstance(event, events.NonFatalError):
            wrong.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    return statuses, wrong


def reopen_after_drains(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has been drained serves nothing more, and there are other requests to come."""
    service = served.service
    drain = service.drain

    async def drain_and_open(timeout_s: float) -> bool:
        drained = await drain(timeout_s)
        service.ready()
        return drained

    monkeypatch.setattr(service, "drain", drain_and_open)


@pytest.mark.parametrize("keys", [True, False])
def test_no_made_up_request_fails_the_server(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: bool
) -> None:
    key, admin = (KEY, ADMIN) if keys else ("", "")
    files = {"keys_file": key_file(tmp_path, alice=KEY), "admin_key_file": private(tmp_path / "admin", ADMIN)}
    with serving(make_server(tiny, settings={"max_n": 2, **(files if keys else {})}, **SMALL)) as served:
        reopen_after_drains(served, monkeypatch)
        document = told(served, ["alice"] if keys else [""])
        statuses, wrong = run(document, config(served, key, admin))
        assert wrong == [], "\n".join(wrong)
        routes = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
        assert set(statuses) == routes
        assert any(route.startswith("POST /admin") for route in routes) == keys
        for route, seen in statuses.items():
            # Good requests come through, but few made-up ones name one thing to be purged, or a session that is open.
            assert seen[200] or "purge" in route or route.startswith("DELETE"), (route, seen)
            assert not route.startswith("POST") or "clear" in route or seen[400], (route, seen)
        served.on_loop(lambda: settled(served.server))
