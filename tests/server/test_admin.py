"""The administration: each operation over HTTP does what it says, and nobody else can ask for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.tiering import parse_tier
from kvwise.server.admin.warm import warm_up
from kvwise.server.tenancy.keys_file import hash_key, parse_keys, show_hash

ADMIN = "an-administrator's-key"
TEXT = "x" * 100  # with the first token of every prompt: six full blocks


class Operator:
    """An administrator, and clients, of one server."""

    def __init__(self, served: Any) -> None:
        self.served = served

    def __call__(self, method: str, path: str, body: Any = None, *, key: str | None = ADMIN, status: int = 200) -> Any:
        """The JSON of an answer with that status; the error of its envelope if it is one."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=self.served.url, headers=headers, timeout=60, verify=False) as client:
            answer = client.request(method, f"/admin{path}", **({} if body is None else {"json": body}))
        assert answer.status_code == status, answer.text
        found = answer.json()
        assert status < 400 or set(found) == {"error"}
        return found if status < 400 else found["error"]

    def complete(self, prompt: str = TEXT, *, key: str = "b", **more: Any) -> int:
        """How many tokens of a tenant's prompt were cached."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, **more}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{self.served.url}/v1/completions", json=body, headers=headers, timeout=60, verify=False)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def check(self) -> None:
        """No block has leaked, in any engine."""
        service = self.served.service
        for strategy in service.strategies:
            self.served.on_loop(lambda s=strategy: service.call(lambda engine: engine.memory.cache.check(), s))


def with_keys(folder: Path, **more: Any) -> dict[str, Any]:
    """Settings with tenants a and b, and an administrator. What b stores is found for an hour."""
    hashes = [show_hash(hash_key(name.encode())) for name in "ab"]
    text = "".join(f'[[tenant]]\nname = "{n}"\nkeys = ["{h}"]\n' for n, h in zip("ab", hashes, strict=True))
    text += 'ttl = "1h"\n'
    for name, content in (("keys", text), ("admin", ADMIN)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    return {"keys_file": folder / "keys", "admin_key_file": folder / "admin", "live": False, **more}


@pytest.fixture
def run(serve_http: Callable[..., Any], tmp_path: Path) -> Callable[..., Operator]:
    """`run(strategies=..., tiers=...)`: a server with two tenants and an administrator."""

    def make(**asked: Any) -> Operator:
        tiers = [parse_tier(tier) for tier in asked.pop("tiers", ())]
        return Operator(serve_http(settings=with_keys(tmp_path), tiers=tiers, **asked))

    return make


# -- who ------------------------------------------------------------------------------------------------------------


def routes(operator: Operator) -> list[tuple[str, str]]:
    document = httpx.get(f"{operator.served.url}/openapi.json", verify=False).json()
    return [(m, p) for p, item in document["paths"].items() if p.startswith("/admin") for m in item]


def test_every_route_asks_for_the_administrations_own_key(run: Callable[..., Operator]) -> None:
    ask = run()
    found = routes(ask)
    assert len(found) == 13
    for method, path in found:
        path = path.removeprefix("/admin").replace("{session}", "s")
        for key in (None, "b", "wrong"):
            assert ask(method.upper(), path, {}, key=key, status=401)["code"] == "invalid_api_key"
    assert ask("GET", "/stats")["state"] == "ready"


def test_the_page_about_serving_names_every_route(run: Callable[..., Operator]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for method, path in routes(run()):
        place = path.replace("{session}", "{id}")
        assert f"`{method.upper()} {place}" in page or f", `{place}`" in page, place
    table = page.split("```toml\n")[1].split("```")[0].replace("3f9a...", "3f" * 32).replace("77b0...", "77" * 32)
    (first, second) = parse_keys(table, "docs/serving.md")
    assert first.tenant is second.tenant
    assert None not in (first.tenant.max_concurrent, first.tenant.cached_bytes, first.tenant.ttl.idle_s)


def test_no_header_but_the_key_opens_it_and_no_other_path_leads_there(run: Callable[..., Operator]) -> None:
    ask = run()
    for headers in ({"Host": "admin"}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Original-URL": "/health"}):
        for path in ("/admin/stats", "/admin//stats", "/v1/../admin/stats", "/%61dmin/stats", "/admin/stats?key=x"):
            assert httpx.get(ask.served.url + path, headers=headers, verify=False).status_code in (401, 404)


def test_without_a_key_there_is_no_administration(serve_http: Callable[..., Any]) -> None:
    ask = Operator(serve_http(settings={"live": False}))
    assert routes(ask) == []
    for key in (None, "b", ADMIN):
        assert ask("GET", "/stats", key=key, status=404)["code"] == "route_not_found"


BAD: list[tuple[str, Any, str]] = [
    ("/warm", {}, "prompts"),
    ("/warm", {"prompts": []}, "prompts"),
    ("/warm", {"prompts": [""]}, "prompts"),
    ("/warm", {"prompts": ["x"] * 257}, "prompts"),
    ("/warm", {"prompts": ["x"], "pin": "true"}, "pin"),
    ("/warm", {"prompts": ["x"], "for_s": 5}, "add pin"),
    ("/warm", {"prompts": [[True]]}, "prompts"),
    ("/warm", {"prompts": [[10**6]], "tenant": "a"}, "vocabulary"),
    ("/warm", {"prompts": ["x"], "tenant": "z"}, "'z'"),
    ("/warm", {"prompts": ["x"]}, "''"),
    ("/warm", {"prompts": ["x"], "tenant": "a", "ttl_s": 0}, "ttl_s"),
    ("/warm", {"prompts": ["x"], "tenant": "a", "scope": "session"}, "session"),
    ("/warm", {"prompts": ["x"], "tenant": "a", "scope": "everybody"}, "scope"),
    ("/warm", {"prompts": ["x"], "tenant": "a", "strategy": "full"}, "not served"),
    ("/warm", {"prompts": ["x"], "tenant": "a", "strategy": "nothing-known"}, "unknown method"),
    ("/pin", {"prompt": "x", "tenant": "a", "until": 5, "for_s": 5}, "one of them"),
    ("/pin", {"prompt": "x", "tenant": "a", "until": 5}, "is over"),
    ("/pin", {"prompt": "x", "colour": 1}, "colour"),
    ("/unpin", {"prompt": 7}, "prompt"),
    ("/residence", {"prompt": "x", "tenant": 7}, "tenant"),
    ("/purge", {}, "say what"),
    ("/purge", {"everything": False}, "everything"),
    ("/purge", {"everything": True, "tenant": "a"}, "alone"),
    ("/purge", {"tenant": "a", "session": "s", "prompt": "x"}, "one of them"),
    ("/purge", {"tenant": "a", "cache_salt": "x"}, "belong to a prompt"),
    ("/sessions/s", {"tenant": "a", "ttl_s": -1}, "ttl_s"),
    ("/sessions/s", {"tenant": "a", "idle_ttl_s": 1e300}, "idle_ttl_s"),
    ("/strategy", {"strategy": "nothing-known"}, "unknown method"),
    ("/strategy", {"strategy": "full", "timeout_s": 0}, "timeout_s"),
    ("/drain", {"timeout_s": "1"}, "timeout_s"),
    ("/drain", [], "object"),
]


def test_what_is_not_sound_is_refused_and_changes_nothing(run: Callable[..., Operator]) -> None:
    ask = run()
    for path, body, words in BAD:
        error = ask("POST", path, body, status=400)
        assert words in error["message"] or words in (error["param"] or ""), (path, body, error)
    assert ask("GET", "/sessions")["sessions"] == []
    (engine,) = ask("GET", "/stats")["engines"]
    assert (engine["stats"]["num_steps"], engine["stats"]["blocks_cached"]) == (0, 0)
    ask("DELETE", "/sessions/none?tenant=a", status=404)
    ask("DELETE", "/sessions/none?tenant=a&colour=1", status=400)
    ask("DELETE", "/sessions/none?tenant=a&purge=maybe", status=400)


# -- keeping --------------------------------------------------------------------------------------------------------


def test_warm_is_resident_for_its_tenant_alone(run: Callable[..., Operator]) -> None:
    ask = run()
    told = ask("POST", "/warm", {"prompts": [TEXT, [256, *b"y" * 50]], "tenant": "b"})
    assert told["resident"]
    first, second = told["prompts"]
    assert (first["tokens"], first["computed"], first["blocks"], first["on_device"]) == (101, 101, 6, 6)
    assert (second["prompt"], second["blocks"], second["error"]) == (1, 3, None)
    assert [ask.complete(key=key) for key in "ab"] == [0, 96]
    (again,) = ask("POST", "/warm", {"prompts": [TEXT], "tenant": "b"})["prompts"]
    assert again["computed"] == 101 - 96
    ask.check()


def test_warm_says_what_is_not_resident(run: Callable[..., Operator]) -> None:
    ask = run(kv_cache_memory_bytes=2**21, max_num_seqs=2)
    total = ask("GET", "/stats")["engines"][0]["stats"]["blocks_total"]
    long = "".join(chr(97 + i % 26) for i in range(total * 16 * 2 // 3))
    told = ask("POST", "/warm", {"prompts": [long, long[1:], "z" * total * 32], "tenant": "a"})
    assert not told["resident"]
    assert [one["resident"] for one in told["prompts"]] == [False, True, False]
    assert "at most" in told["prompts"][2]["error"]
    ask.check()


def test_a_pinned_prompt_stays_until_it_is_unpinned(run: Callable[..., Operator]) -> None:
    ask = run(kv_cache_memory_bytes=2**21, max_num_seqs=2)
    total = ask("GET", "/stats")["engines"][0]["stats"]["blocks_total"]

    def flood() -> None:
        for letter in "de":
            ask.complete(letter * (total * 16 * 2 // 3), key="b")

    ask("POST", "/warm", {"prompts": [TEXT], "tenant": "a", "pin": True})
    flood()
    assert ask.complete(key="a") == 96
    asked = {"prompt": TEXT, "tenant": "a"}
    assert ask("POST", "/unpin", asked)["engines"][0]["blocks"] == 6
    assert ask("POST", "/unpin", asked)["engines"][0]["blocks"] == 0
    assert ask("POST", "/pin", {**asked, "for_s": 3600})["engines"][0]["blocks"] == 6
    flood()
    assert ask("POST", "/residence", asked)["engines"][0]["on_device"] == 6
    ask("POST", "/unpin", asked)
    flood()
    assert ask.complete(key="a") == 0
    ask.check()


def test_clear_empties_the_device_and_no_tier(run: Callable[..., Operator]) -> None:
    ask = run(strategies=("full+prefix+load",), tiers=["host(size=16MiB)"])
    ask.complete()
    ask.served.on_loop(lambda: ask.served.service.call(lambda engine: engine.memory.hierarchy.flush()))
    assert ask("POST", "/clear")["engines"][0]["blocks"] == 6
    (where,) = ask("POST", "/residence", {"prompt": TEXT, "tenant": "b"})["engines"]
    assert (where["on_device"], where["below"], where["resident"]) == (0, {"host": 6}, True)
    assert ask.complete() == 96


# -- forgetting -----------------------------------------------------------------------------------------------------

TIERED = {"strategies": ("full+prefix+load",), "tiers": ["host(size=16MiB)"]}


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ({"everything": True}, [0, 0, 0, 0]),
        ({"tenant": "a"}, [0, 0, 0, 96]),
        ({"tenant": "a", "session": "s"}, [0, 96, 96, 96]),
        ({"tenant": "a", "prompt": TEXT}, [96, 0, 96, 96]),
        ({"tenant": "a", "prompt": TEXT, "cache_salt": "z"}, [96, 96, 0, 96]),
    ],
    ids=str,
)
def test_a_purge_takes_what_it_names_from_every_tier_and_nothing_else(
    run: Callable[..., Operator], what: dict[str, Any], left: list[int]
) -> None:
    ask = run(**TIERED)
    asked: list[dict[str, Any]] = [
        {"prompt": "s" * 100, "key": "a", "session_id": "s"}, {"key": "a"}, {"key": "a", "cache_salt": "z"},
        {"key": "b"},
    ]  # fmt: skip
    for one in asked:
        assert ask.complete(**one) == 0
    told = ask("POST", "/purge", what)
    assert told["proven"]
    (engine,) = told["engines"]
    taken = 6 * left.count(0)
    assert [(t["tier"], t["blocks"], t["overwritten"]) for t in engine["tiers"]] == [
        ("device", taken, True), ("host", taken, True),
    ]  # fmt: skip
    assert all(tier["bytes"] > 0 and tier["found_again"] == 0 for tier in engine["tiers"])
    assert [ask.complete(**one) for one in asked] == left
    ask.check()


def test_a_purge_that_leaves_something_is_not_proven(
    run: Callable[..., Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = run(**TIERED)
    ask.complete()
    monkeypatch.setattr("kvwise.engine.hierarchy.tier.Tier.remove", lambda *args, **named: [])
    monkeypatch.setattr("kvwise.engine.lifecycle.Lifecycle._prove_gone", lambda self, keys: None)
    for what in ({"tenant": "b"}, {"everything": True}):
        told = ask("POST", "/purge", what)
        assert not told["proven"]
        assert [tier["found_again"] for tier in told["engines"][0]["tiers"]] == [0, 6]


# -- sessions -------------------------------------------------------------------------------------------------------


def test_sessions_are_each_tenants_own(run: Callable[..., Operator]) -> None:
    ask = run()
    for key in "ab":
        ask.complete(key=key, session_id="chat/1")
    opened = ask("POST", "/sessions/chat/1", {"tenant": "a", "idle_ttl_s": 60})
    assert opened == {"session": "chat/1", "tenant": "a", "is_open": True, "purged": None}
    first, second = ask("GET", "/sessions")["sessions"]
    assert (first["session"], first["tenant"], first["is_open"], first["blocks"]) == ("chat/1", "a", True, 6)
    assert 0 < first["closes_in_s"] <= 60
    assert (second["session"], second["tenant"]) == ("chat/1", "b")
    assert 60 < second["closes_in_s"] <= EngineConfig().session_idle_s  # nobody has said how long
    assert not ask("DELETE", "/sessions/chat/1?tenant=a")["is_open"]
    assert [one["is_open"] for one in ask("GET", "/sessions")["sessions"]] == [False, True]
    purged = ask("DELETE", "/sessions/chat/1?tenant=b&purge=true")["purged"]
    assert purged["proven"]
    assert [tier["blocks"] for tier in purged["engines"][0]["tiers"]] == [6]
    assert [ask.complete(key=key) for key in "ab"] == [96, 0]


# -- the service ----------------------------------------------------------------------------------------------------


def test_every_engine_is_administered(run: Callable[..., Operator]) -> None:
    strategies = ("full+prefix", "window(budget=0.5)+prefix", "full")
    ask = run(strategies=strategies)
    names = ask("GET", "/strategy")
    assert names["default"] == names["strategies"][0]
    assert len(names["strategies"]) == len(ask("GET", "/stats")["engines"]) == 3
    told = ask("POST", "/warm", {"prompts": [TEXT], "tenant": "b"})
    assert [one["strategy"] for one in told["prompts"]] == names["strategies"][:2]  # the third shares nothing
    assert len(ask("POST", "/purge", {"everything": True})["engines"]) == 3
    ask("POST", "/warm", {"prompts": [TEXT], "tenant": "b", "strategy": "full"}, status=400)


def test_a_switch_changes_what_is_served_and_keeps_tenants_times_to_live(
    serve_http: Callable[..., Any], tmp_path: Path
) -> None:
    clock = VirtualClock()
    ask = Operator(serve_http(settings=with_keys(tmp_path), clock=clock, ready=False))
    ask.served.on_loop(lambda: warm_up(ask.served.server))
    for strategy in (None, "window(budget=0.5)+prefix"):
        if strategy is not None:
            assert ask("POST", "/strategy", {"strategy": strategy})["strategies"] == [strategy]
        assert [ask.complete(key=key) for key in "abab"] == [0, 0, 96, 96]
        clock.advance(3601)
        assert [ask.complete(key=key) for key in "ab"] == [96, 0]
    assert ask("GET", "/stats")["state"] == "ready"
    ask.check()


def test_a_switch_waits_for_what_runs(run: Callable[..., Operator]) -> None:
    ask = run()
    held = {"model": "tiny", "prompt": TEXT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    url, headers = f"{ask.served.url}/v1/completions", {"Authorization": "Bearer a"}
    with httpx.stream("POST", url, json=held, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        error = ask("POST", "/strategy", {"strategy": "full", "timeout_s": 0.01}, status=409)
    assert error["code"] == "requests_running"
    assert ask("GET", "/strategy")["default"] != "full"


def test_drain_ends_what_runs_and_takes_no_more(run: Callable[..., Operator]) -> None:
    ask = run()
    assert ask("POST", "/drain", {}) == {"state": "draining", "drained": True}
    refused = httpx.post(f"{ask.served.url}/v1/completions", json={}, headers={"Authorization": "Bearer a"})
    assert refused.status_code == 503
    assert ask("GET", "/stats")["state"] == "draining"


# -- the warm file --------------------------------------------------------------------------------------------------


def warmed(serve_http: Callable[..., Any], folder: Path, lines: list[Any], **asked: Any) -> Operator:
    """A server that has not begun to serve, with a warm file."""
    (folder / "warm").write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    settings = with_keys(folder, warm_file=folder / "warm")
    return Operator(serve_http(settings=settings, ready=False, **asked))


def test_the_warm_file_is_resident_and_pinned_before_requests_are_welcome(
    serve_http: Callable[..., Any], tmp_path: Path
) -> None:
    lines = [{"prompt": TEXT, "salt": "b"}, {"prompt": "y" * 40, "salt": "a", "session": "chat"}]
    ask = warmed(serve_http, tmp_path, lines, strategies=("full+prefix", "full"))
    assert httpx.get(f"{ask.served.url}/health", verify=False).status_code == 503
    seen: list[Any] = []
    service = ask.served.service
    submit = service.submit_warm
    service.submit_warm = lambda *args, **named: seen.append(service.health) or submit(*args, **named)
    ask.served.on_loop(lambda: warm_up(ask.served.server))
    assert seen == ["warming", "warming"]
    assert httpx.get(f"{ask.served.url}/health", verify=False).status_code == 200
    assert [ask.complete(key=key) for key in "ab"] == [0, 96]
    assert ask("POST", "/unpin", {"prompt": TEXT, "tenant": "b"})["engines"][0]["blocks"] == 6
    assert ask("GET", "/sessions")["sessions"][0]["tenant"] == "a"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([TEXT], "salt must be a tenant's name"),
        ([{"prompt": TEXT, "salt": "zoe"}], "salt must be a tenant's name"),
        ([{"prompt": "x" * 10**5, "salt": "a"}], "prompt 1: .*more than"),
        ([{"prompt": c * 400, "salt": "a"} for c in "xyzuvw"], "do not fit"),
        ([{"prompt": TEXT, "salt": "a", "colour": 1}], "unknown field"),
    ],
    ids=["nobody's", "a stranger's", "too long", "too many", "unknown field"],
)
def test_a_warm_file_that_cannot_be_kept_is_told_and_nothing_is_served(
    serve_http: Callable[..., Any], tmp_path: Path, lines: list[Any], words: str
) -> None:
    ask = warmed(serve_http, tmp_path, lines, kv_cache_memory_bytes=2**21, max_num_seqs=2)
    with pytest.raises(UsageError, match=words):
        ask.served.on_loop(lambda: warm_up(ask.served.server))
    assert httpx.get(f"{ask.served.url}/health", verify=False).status_code == 503


def test_a_server_without_a_warm_file_is_ready_at_once_and_a_draining_one_stays_so(
    serve_http: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = (Operator(serve_http(settings=with_keys(tmp_path), ready=False)) for _ in range(2))
    first.served.on_loop(lambda: warm_up(first.served.server))
    assert first.complete() == 0
    second.served.on_loop(lambda: second.served.service.drain(1))
    second.served.on_loop(lambda: warm_up(second.served.server))
    assert second("GET", "/stats")["state"] == "draining"
