"""Every field of the schema acts, or is refused. The cases are checked against the schema: a new field needs some."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.engine.service import Generate
from kvwise.server.api.schema import ChatRequest, CompletionRequest, Message, StreamOptions
from tests.server.asgi import post as send
from tests.server.conftest import make_server, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
EVERY = (True, "12", [], {}, 1.5)  # kinds of values; each field leaves out those it takes
BREAK = {"mode": "explicit"}


@dataclass(frozen=True)
class Case:
    """`acts`: value -> (what of the engine's request, what it is then). `refused`: values, beside the wrong kinds."""

    acts: Mapping[Any, Any] = field(default_factory=dict)
    reads: Any = None
    refused: tuple[Any, ...] = ()
    neutral: tuple[Any, ...] = ()  # accepted, and nothing changes
    beside: Mapping[str, Any] = field(default_factory=dict)


def number(name: str, acts: Mapping[Any, Any], *refused: Any) -> Case:
    return Case(acts, lambda one: getattr(one.params, name), (*refused, True, "1", [], {}))


def unsupported(*neutral: Any, refused: tuple[Any, ...]) -> Case:
    return Case(refused=refused, neutral=(None, *neutral))


TTL = {"in_memory": Ttl(3600.0, 600.0), "24h": Ttl(86400.0, 86400.0)}
COMMON: dict[str, Case] = {
    "model": Case(refused=("", 3, None, True, "x" * 300)),
    "stream": Case(refused=(1, "true", 0)),  # acts: test_answers_as_streams
    "stream_options": Case(refused=({}, True, {"include_usage": 1}, {"x": 1}, {"include_obfuscation": True})),
    "max_tokens": number("max_tokens", {1: 1, 7: 7}, 0, -1, 1.0),
    "min_tokens": number("min_tokens", {0: 0, 3: 3, None: 0}, -1, 2.0, 17),
    "temperature": number("temperature", {0: 0.0, 0.5: 0.5, 2: 2.0, None: 1.0}, -0.1, 2.01),
    "top_p": number("top_p", {1: 1.0, 0.1: 0.1, None: 1.0}, 0, 1.1, -1),
    "top_k": number("top_k", {-1: 0, 0: 0, 5: 5, None: 0}, -2, 1.0),
    "min_p": number("min_p", {0: 0.0, 0.3: 0.3, None: 0.0}, -0.1, 1.1),
    "n": number("n", {1: 1, 3: 3, None: 1}, 0, -1, 65, 2.0),
    "stop": Case({"x": ("x",), ("a", "bc"): ("a", "bc"), None: (), (): ()}, lambda one: one.params.stop,
                 ("", [""], ["a"] * 5, 3, [3], {}, True, "x" * 257)),
    "stop_token_ids": Case({(1, 2): (1, 2), None: ()}, lambda one: one.params.stop_token_ids,
                           ([-1], [1.0], ["1"], [True], 3, "3", [10**6], [1] * 65)),
    "ignore_eos": Case({True: True, None: False}, lambda one: one.params.ignore_eos, (1, "true", [])),
    "seed": number("seed", {0: 0, -5: -5, 2**63 - 1: 2**63 - 1, None: None}, 1.0, 2**63),
    "presence_penalty": number("presence_penalty", {-2: -2.0, 1.5: 1.5, None: 0.0}, -2.1, 2.1),
    "frequency_penalty": number("frequency_penalty", {-2: -2.0, 1.5: 1.5, None: 0.0}, -2.1, 2.1),
    "repetition_penalty": number("repetition_penalty", {1.2: 1.2, 0.01: 0.01, None: 1.0}, 0, 1e-9, -1, 101),
    "logit_bias": Case(refused=({"a": 1}, {"-1": 1}, {"1": 101}, {"1": -100.5}, {"1": "2"}, {"1": True}, {"1": None},
                                {"1.0": 1}, {"99999": 1}, {"1": 1, "01": 2}, [1], "1", 3, True)),
    "user": Case(refused=(3, True, [], "x" * 513)),  # acts: below
    "priority": Case(refused=(3, 1.0, "1", True, 2**40), neutral=(None, 0)),  # acts: below
    "session_id": Case({"chat-7": "chat-7", None: ""}, lambda one: one.session,
                       ("", " ", "a b", "a\n", "é", "x" * 129, "key:x", 3, True, [])),
    "cache_salt": Case({"pepper": "pepper", "é" * 128: "é" * 128, None: ""}, lambda one: one.cache_salt,
                       ("", "x" * 129, 3, True)),
    "prompt_cache_key": Case({"k 1": "key:k 1", None: ""}, lambda one: one.session, ("", "x" * 129, 3, True)),
    "prompt_cache_options": Case(refused=("implicit", True, [], {"mode": "x"}, {"ttl": 30}, {"ttl": "30"},
                                          {"ttl": "0m"}, {"ttl": "-1m"}, {"ttl": "31d"}, {"ttl": "1.5m"},
                                          {"x": 1}, {"mode": None})),
    "prompt_cache_retention": Case({**TTL, None: NO_TTL}, lambda one: one.ttl, ("1h", 3, True, "in-memory")),
    "strategy": Case({"full": "full", None: None, "prefix": "prefix", "full+prefix": "prefix"},
                     lambda one: one.strategy, ("", "h2o(budget=0.2)", "nonsense", "x" * 600, 3, True)),
    "attest": Case(refused=(1, "true", [])),  # acts: below
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f"}}
CHATS: dict[str, Case] = COMMON | {
    "messages": Case(refused=([], None, "hi", 3)),  # more: test_chat
    "max_completion_tokens": number("max_tokens", {9: 9}, 0, -1, 1.0),
    "logprobs": Case({True: 0, False: None, None: None}, lambda one: one.params.logprobs, (1, 3, "true", [])),
    "top_logprobs": Case({0: 0, 20: 20}, lambda one: one.params.logprobs, (-1, 21, 1.0, True, "1"),
                         beside={"logprobs": True}),
    "tools": unsupported([], refused=([TOOL], {}, True)),
    "tool_choice": unsupported("none", refused=("auto", "required", TOOL)),
    "parallel_tool_calls": unsupported(refused=(True, False)),
    "functions": unsupported([], refused=([{"name": "f"}],)),
    "function_call": unsupported("none", refused=("auto", {"name": "f"})),
    "response_format": unsupported(
        {"type": "text"}, refused=({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "text")
    ),
    "modalities": unsupported(["text"], refused=(["text", "audio"], "text")),
    "audio": unsupported(refused=({"voice": "x", "format": "wav"},)),
    "prediction": unsupported(refused=({"type": "content", "content": "x"},)),
    "reasoning_effort": unsupported("none", refused=("low", "high")),
    "verbosity": unsupported("medium", refused=("low", "high")),
    "web_search_options": unsupported(refused=({},)),
    "moderation": unsupported(refused=({"model": "x"},)),
    "service_tier": unsupported("auto", "default", refused=("flex", "priority")),
    "store": unsupported(False, refused=(True, 0)),
    "metadata": unsupported({}, refused=({"a": "b"},)),
    "safety_identifier": unsupported(refused=("x",)),
}  # fmt: skip
TEXTS: dict[str, Case] = COMMON | {
    "prompt": Case(refused=(None, [], [[]], 3, True, {}, [1.0])),  # more: test_completions
    "logprobs": number("logprobs", {0: 0, 20: 20, None: None}, -1, 21, 1.0),
    "echo": unsupported(False, refused=(True, 0)),
    "suffix": unsupported("", refused=("x",)),
    "best_of": Case({1: 1, None: 1}, lambda one: one.params.n, (2, 0, 1.0, True)),
}
ROUTES = {CHAT: (ChatRequest, CHATS), COMPLETIONS: (CompletionRequest, TEXTS)}
ALL = [(path, name) for path, (_, cases) in ROUTES.items() for name in cases]


@pytest.fixture(scope="module")
def two(tiny: Any) -> Iterator[Any]:
    with serving(make_server(tiny, strategies=("full+prefix", "full"))) as one:
        yield one


@contextmanager
def submitted(served: Any) -> Iterator[list[Generate]]:
    """What reaches the engine meanwhile."""
    found: list[Generate] = []
    submit = served.service.submit
    served.service.submit = lambda one: (found.append(one), submit(one))[1]
    try:
        yield found
    finally:
        del served.service.submit


def post(served: Any, path: str, **fields: Any) -> httpx.Response:
    basis = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    sent = {"model": "tiny", "max_tokens": 4, **basis, **fields}
    return send(served.url + path, sent)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_has_a_case(path: str) -> None:
    kind, cases = ROUTES[path]
    assert set(kind.model_fields) == set(cases)
    for case in cases.values():
        assert case.acts or case.refused


def test_parts_of_messages_and_of_streams_have_theirs() -> None:
    assert set(Message.model_fields) - {"role", "content"} == set(MESSAGE)
    assert set(StreamOptions.model_fields) == {"include_usage", "include_obfuscation"}


@pytest.mark.parametrize(("path", "name"), ALL)
def test_a_field_acts(two: Any, path: str, name: str) -> None:
    case = ROUTES[path][1][name]
    for value, expected in case.acts.items():
        with submitted(two) as found:
            limit = {} if name.startswith("max") else {"max_tokens": 4}
            answer = post(two, path, **{"max_tokens": None} | limit | dict(case.beside) | {name: plain(value)})
        assert answer.status_code == 200, answer.text
        assert [case.reads(one) for one in found] == [expected]
    if case.neutral:
        usual = post(two, path, temperature=0).json()["choices"]
        for value in case.neutral:
            assert post(two, path, temperature=0, **{name: value}).json()["choices"] == usual


@pytest.mark.parametrize(("path", "name"), ALL)
def test_a_field_is_refused(two: Any, path: str, name: str) -> None:
    case = ROUTES[path][1][name]
    with submitted(two) as found:
        for value in case.refused:
            answer = post(two, path, **{**case.beside, name: value})
            if name == "model" and isinstance(value, str) and 0 < len(value) < 257:
                assert answer.status_code == 404
                continue
            assert answer.status_code == 400, (value, answer.text)
            error = answer.json()["error"]
            if value != 2**63:  # that is no JSON integer here, wherever it is
                assert (error["param"] or "").startswith(name), (value, error)
                assert name in error["message"] or "session" in error["message"], error
    assert found == []


MESSAGE: dict[str, Case] = {
    "name": unsupported(refused=("bob",)),
    "refusal": unsupported(refused=("no",)),
    "annotations": unsupported([], refused=([{}],)),
    "audio": unsupported(refused=({"id": "x"},)),
    "tool_calls": unsupported([], refused=([TOOL],)),
    "function_call": unsupported(refused=({"name": "f", "arguments": ""},)),
}


@pytest.mark.parametrize("name", MESSAGE)
def test_fields_of_messages(two: Any, name: str) -> None:
    for value in MESSAGE[name].neutral:
        assert post(two, CHAT, messages=[{**HI[0], name: value}]).status_code == 200
    for value in MESSAGE[name].refused:
        error = post(two, CHAT, messages=[{**HI[0], name: value}]).json()["error"]
        assert error["param"] == f"messages[0].{name}"
        assert "implemented" in error["message"]


def test_unknown_fields_are_refused_by_name(two: Any) -> None:
    for path in ROUTES:
        error = post(two, path, guided_json={}).json()["error"]
        assert (error["param"], error["code"]) == ("guided_json", "unknown_parameter")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"n": 2, "logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_fields_that_do_not_go_together(two: Any, fields: Any, param: str) -> None:
    answer = post(two, CHAT, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert post(two, CHAT, max_tokens=3, max_completion_tokens=3).json()["usage"]["completion_tokens"] <= 3


def test_logit_bias_and_the_ends_of_an_answer(two: Any) -> None:
    ends = {"logit_bias": {"257": 100, "65": 90}, "temperature": 0, "max_tokens": 6}
    at_once = post(two, COMPLETIONS, **ends).json()
    assert (at_once["choices"][0]["finish_reason"], at_once["usage"]["completion_tokens"]) == ("stop", 1)
    later = post(two, COMPLETIONS, min_tokens=3, **ends).json()
    assert (later["choices"][0]["text"], later["usage"]["completion_tokens"]) == ("AAA", 4)
    assert post(two, COMPLETIONS, ignore_eos=True, **ends).json()["choices"][0]["finish_reason"] == "length"
    stops = post(two, COMPLETIONS, logit_bias={"65": 100}, stop_token_ids=[65], temperature=0).json()
    assert stops["usage"]["completion_tokens"] == 1
    text = post(two, COMPLETIONS, logit_bias={"65": 100}, stop="AAA", temperature=0, max_tokens=9).json()["choices"][0]
    assert (text["text"], text["finish_reason"]) == ("", "stop")


def test_caching_fields_together(two: Any) -> None:
    def sent(header: str | None = None, **fields: Any) -> Generate:
        headers = {} if header is None else {"x-session-id": header}
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 1, **fields}
        with submitted(two) as found:
            answer = send(two.url + COMPLETIONS, body, headers)
        assert answer.status_code == 200, answer.text
        return found[0]

    assert sent("mine").session == "mine"
    assert sent("mine", session_id="mine", prompt_cache_key="k").session == "mine"
    assert sent(prompt_cache_options={"ttl": "30m"}).ttl == Ttl(idle_s=1800.0)
    assert sent(prompt_cache_options={"ttl": "2h"}, prompt_cache_retention="24h").ttl == Ttl(86400.0, 7200.0)
    assert sent(prompt_cache_options={"ttl": "2h"}, prompt_cache_retention="in_memory").ttl == Ttl(3600.0, 600.0)
    assert sent(prompt_cache_options={"mode": "implicit"}).num_shareable is None
    assert sent(prompt_cache_options={"mode": "explicit"}).num_shareable == 0
    body = {"model": "tiny", "prompt": "hi", "session_id": "a"}
    answer = send(two.url + COMPLETIONS, body, {"x-session-id": "b"})
    assert answer.json()["error"]["param"] == "session_id"
    answer = send(two.url + COMPLETIONS, {"model": "tiny", "prompt": "hi"}, {"x-session-id": "a b"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Session-ID")


def test_a_request_may_ask_what_was_done_to_it(two: Any) -> None:
    for path in ROUTES:
        usual, asked = post(two, path).json(), post(two, path, attest=True, strategy="full").json()
        assert "kvwise" not in str(usual)
        told = asked["choices"][0]["kvwise"]
        assert told["strategy"] == "full"
        assert told["tokens_seen"] * told["layers_and_heads"] == told["tokens_kept"]
        assert "miss" not in str(told)  # that could tell of others


def test_priority_where_the_server_heeds_it(serve_http: Any) -> None:
    served = serve_http(scheduling_policy="priority")
    with submitted(served) as found:
        assert post(served, COMPLETIONS, priority=-7).status_code == 200
    assert found[0].priority == -7


def test_the_user_is_in_the_record(two: Any) -> None:
    heard: list[Any] = []

    class Listener:
        def accepted(self, record: Any) -> None: ...
        def tokens(self, record: Any, num_tokens: int, now: float) -> None: ...
        def ended(self, record: Any) -> None:
            heard.append(record)

    two.server.observers.append(listener := Listener())
    post(two, CHAT, user="u-1")
    post(two, CHAT, user="u-2", n=0)
    post(two, CHAT, model="nope")
    two.server.observers.remove(listener)
    assert [(one.user, one.status, one.error) for one in heard] == [
        ("u-1", 200, None), ("", 400, "invalid_value"), ("", 404, "model_not_found"),
    ]  # fmt: skip
    assert heard[0].route == CHAT
    assert heard[0].num_output == 4
    assert heard[2].model == ""  # no label that a client could choose
