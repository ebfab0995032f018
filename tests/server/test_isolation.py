"""What one tenant stores changes nothing that another can see, down to the work that the engine does for it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvwise.cache.scopes import Scope
from kvwise.core.clock import VirtualClock
from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.core.tiering import parse_tier
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.models.loaded import LoadedModel
from kvwise.server.tenancy.keys_file import hash_key, parse_keys, show_hash
from kvwise.server.tenancy.tenants import Tenant, Tenants

SECRET = [7 + i % 200 for i in range(80)]  # five full blocks
TIMES = ("arrival", "first_scheduled", "first_token", "finished", "token_times")


def tenants() -> tuple[Tenant, Tenant]:
    hashes = [show_hash(hash_key(name.encode())) for name in "ab"]
    text = "".join(f'[[tenant]]\nname = "{n}"\nkeys = ["{h}"]\n' for n, h in zip("ab", hashes, strict=True))
    first, second = (key.tenant for key in parse_keys(text, "f"))
    return first, second


ALICE, BOB = tenants()


class Asked:
    """An engine, and what each step of it computed."""

    def __init__(self, loaded: LoadedModel, strategy: str, tiers: list[str]) -> None:
        config = EngineConfig(
            kv_cache_memory_bytes=2**23, max_num_batched_tokens=64, max_num_seqs=8, check=True,
            tiers=[parse_tier(tier) for tier in tiers],
        )  # fmt: skip
        self.engine = Engine(loaded, parse(strategy), config)

    def ask(self, tenant: Tenant, prompt: list[int], **more: Any) -> dict[str, Any]:
        """What a request's client can learn, and the tokens that each step computed for it."""
        params, session = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2), more.pop("session", "")
        engine = self.engine
        engine.add_request(prompt, params, salt=tenant.id, session=tenant.session_key(session), **more)
        work, outputs = [], []
        while engine.has_unfinished():
            outputs += [(o, engine.num_step_tokens) for o in engine.step()]
            work.append(engine.num_step_tokens)
        last = outputs[-1][0]
        if (hierarchy := engine.memory.hierarchy) is not None:
            hierarchy.flush()
        metrics = {name: value for name, value in asdict(last.metrics).items() if name not in TIMES}
        metrics.pop("load")  # seconds
        return {
            "work": work, "news": [(o.new_token_ids, at) for o, at in outputs], "text": last.text, "error": last.error,
            "logprobs": last.logprobs, "metrics": metrics, "attestation": asdict(last.attestation),
        }  # fmt: skip


KINDS: list[tuple[str, list[str]]] = [
    ("full+prefix", []),
    ("full+prefix+load", ["host(size=16MiB)"]),
    ("full+prefix+cake", ["host(size=16MiB)", "disk(path={tmp}, size=16MiB)"]),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0])
def start(request: pytest.FixtureRequest, tiny: LoadedModel, tmp_path: Path) -> Any:
    """`start()`: an engine of this kind, with a folder of its own; closed when the test ends."""
    made: list[Asked] = []
    strategy, tiers = request.param

    def make() -> Asked:
        where = tmp_path / str(len(made))
        made.append(Asked(tiny, strategy, [tier.replace("{tmp}", str(where)) for tier in tiers]))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def without_reason(seen: dict[str, Any]) -> dict[str, Any]:
    """Why a look-up ended is told to the operator alone: see `usage.attested`."""
    metrics = {name: value for name, value in seen["metrics"].items() if name != "miss"}
    return {**seen, "metrics": metrics}


ASKED_BY_ALICE: list[dict[str, Any]] = [
    {}, {"session": "chat"}, {"session": "chat", "scope": Scope.SESSION}, {"cache_salt": "a"},
]  # fmt: skip
GUESSED_BY_BOB: list[dict[str, Any]] = [
    {"cache_salt": ALICE.id}, {"cache_salt": f'["tenant", "{ALICE.id}"]'}, {"session": ALICE.session_key("chat")},
    {"session": ALICE.session_key("chat"), "scope": Scope.SESSION},
]  # fmt: skip


def test_the_engine_does_the_same_work_for_one_tenant_whatever_another_has_stored(start: Callable[[], Asked]) -> None:
    empty, full = start(), start()
    for more in ASKED_BY_ALICE:
        full.ask(ALICE, SECRET, **more)
    for first, more in enumerate([*ASKED_BY_ALICE, *GUESSED_BY_BOB]):
        alone, beside = empty.ask(BOB, SECRET, **more), full.ask(BOB, SECRET, **more)
        if first == 0:
            assert beside["metrics"]["num_cached_tokens"] == beside["attestation"]["tokens_loaded"] == 0
            assert sum(beside["work"]) >= len(SECRET)
        assert without_reason(beside) == without_reason(alone)


def test_the_same_tenant_would_have_been_seen(start: Callable[[], Asked]) -> None:
    empty, full = start(), start()
    full.ask(ALICE, SECRET)
    assert full.ask(ALICE, SECRET)["work"] != empty.ask(ALICE, SECRET)["work"]


def test_a_cache_salt_only_narrows(start: Callable[[], Asked]) -> None:
    one = start()
    for salt in ("x", "y", ""):
        assert one.ask(ALICE, SECRET, cache_salt=salt)["metrics"]["num_cached_tokens"] == 0
    found = one.ask(ALICE, SECRET, cache_salt="x")
    assert found["metrics"]["num_cached_tokens"] + found["attestation"]["tokens_loaded"] > 0


def test_a_purge_by_one_tenant_leaves_the_others(start: Callable[[], Asked]) -> None:
    one = start()
    for tenant in (ALICE, BOB):
        one.ask(tenant, SECRET, session="chat")
    one.engine.purge_session(ALICE.session_key("chat"))
    one.engine.lifecycle.purge_tenant(ALICE.id)
    found = one.ask(BOB, SECRET, session="chat")
    assert found["metrics"]["num_cached_tokens"] + found["attestation"]["tokens_loaded"] > 0


def test_sessions_of_one_name_are_two(start: Callable[[], Asked]) -> None:
    one = start()
    one.engine.lifecycle.open_session(ALICE.session_key("chat"), tenant=ALICE.id)
    assert one.ask(BOB, SECRET, session="chat")["error"] is None
    assert len(one.engine.lifecycle.sessions()) == 2


# -- over HTTP ------------------------------------------------------------------------------------------------------

ANY = {"date", "x-request-id"}  # headers that tell the moment, or are random


@pytest.fixture
def two_servers(serve_http: Callable[..., Any], tmp_path: Path) -> list[Any]:
    """Two servers with the same tenants, a and b."""
    hashes = [show_hash(hash_key(name.encode())) for name in "ab"]
    more = "requests_per_minute = 100\ntokens_per_minute = 100000\nmax_concurrent = 4\n"
    text = "".join(f'[[tenant]]\nname = "{n}"\nkeys = ["{h}"]\n{more}' for n, h in zip("ab", hashes, strict=True))
    (tmp_path / "keys").write_text(text)
    (tmp_path / "keys").chmod(0o600)
    asked = {"keys_file": tmp_path / "keys", "live": False}
    made = [serve_http(settings=asked) for _ in range(2)]
    for one in made:  # quotas on a clock that stands still
        one.server.tenants = Tenants.open(one.server.settings, clock=VirtualClock())
    return made


def say(served: Any, key: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """An answer without what is of the moment: its status, headers and body."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60, verify=False) as client:
        answer = client.get(path) if body is None else client.post(path, json=body)
    told = {name: value for name, value in answer.headers.items() if name not in ANY and "ratelimit-reset" not in name}
    content = answer.json()
    for name in ("id", "created"):
        content.pop(name, None)
    return {"status": answer.status_code, "headers": told, "body": content}


def test_nothing_in_a_tenants_answers_tells_of_another(two_servers: list[Any]) -> None:
    empty, full = two_servers
    prompt = {"model": "tiny", "prompt": "x" * 100, "max_tokens": 4, "temperature": 0}
    asked: list[dict[str, Any] | None] = [
        {**prompt, "session_id": "s"}, prompt, {**prompt, "cache_salt": "z"}, {**prompt, "prompt_cache_key": "k"},
        {**prompt, "attest": True}, {**prompt, "prompt": "y" * 100_000}, {**prompt, "session_id": ""},
        {**prompt, "strategy": "full"}, {**prompt, "model": "other"},
    ]  # fmt: skip
    for body in asked[:4]:
        first = say(full, "a", "/v1/completions", body)
        assert first["status"] == 200
    cached = say(full, "a", "/v1/completions", prompt)["body"]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == 96
    for number, body in enumerate(asked):
        alone, beside = (say(one, "b", "/v1/completions", body) for one in (empty, full))
        assert alone == beside
        if number == 0:
            assert beside["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for path in ("/v1/models", "/v1/models/tiny", "/admin/stats", "/admin/sessions"):
        alone, beside = (say(one, "b", path) for one in (empty, full))
        assert alone["status"] == beside["status"] == (404 if "admin" in path else 200)
        assert alone == beside


def test_one_tenants_load_does_not_refuse_anothers(two_servers: list[Any]) -> None:
    served = two_servers[0]
    tenants = served.server.tenants
    noisy = tenants.named("a")
    leases = [tenants.lease(noisy, 10, 10) for _ in range(4)]
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    refused, answered = (say(served, key, "/v1/completions", body) for key in "ab")
    assert (refused["status"], refused["body"]["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused["headers"]["retry-after"] == "1"
    assert answered["status"] == 200
    assert answered["headers"]["x-ratelimit-remaining-requests"] == "99"
    for lease in leases:
        lease.finish(0)
    assert say(served, "a", "/v1/completions", body)["status"] == 200
    assert [tenants.num_running(tenants.named(name)) for name in "ab"] == [0, 0]
