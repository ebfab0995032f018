"""OpenAI's own Python client works unchanged: what it sends is understood, what it reads is what the engine made."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from kvwise.engine.service import Generate, ServiceLimits
from kvwise.models.loaded import LoadedModel
from tests.server.conftest import MODEL, Served, key_file, make_server, serving

KEY = "sk-a-key-of-the-tests"
HI = [{"role": "user", "content": "hi there"}]
LONG = "a prefix of four blocks, told again and again to see it found, and then some"


@pytest.fixture(scope="module")
def locked(tiny: LoadedModel) -> Iterator[Served]:
    """A server with a key and two strategies."""
    with serving(make_server(tiny, strategies=("full+prefix", "full"), api_keys=[KEY], max_model_len=256)) as one:
        yield one


@pytest.fixture(scope="module")
def client(locked: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0, timeout=60) as one:
        yield one


@contextmanager
def retrying(served: Served, seen: list[httpx.Response], key: str = KEY, retries: int = 2) -> Iterator[openai.OpenAI]:
    """A client whose every answer, those it tries again after too, is put into `seen`."""
    with (
        httpx.Client(event_hooks={"response": [seen.append]}, timeout=60) as http,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=retries, http_client=http) as one,
    ):
        yield one


def without_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client means to wait before it tries again, which it does at once."""
    pauses: list[float] = []
    fake = SimpleNamespace(**{**vars(time), "sleep": pauses.append})
    monkeypatch.setattr("openai._base_client.time", fake)
    return pauses


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel) -> Any:
    """What the engine itself answers to HI."""
    with LLM(tiny, "full+prefix", kv_cache_memory_bytes=2**24) as llm:
        return llm.generate([tiny.tokenizer.chat(HI)], SamplingParams(max_tokens=12, logprobs=2))[0]


# -- chats --------------------------------------------------------------------------------------------------------


def test_a_chat(client: openai.OpenAI, expected: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2, user="u-1",
        extra_headers={"X-Request-Id": "mine-1"},
    )  # fmt: skip
    answer = raw.parse()
    assert raw.headers["x-request-id"] == answer._request_id == "mine-1"
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_an_answer_is_a_turn_of_the_next_chat(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=4, temperature=0).choices[0].message
    again = [*HI, first, {"role": "user", "content": [{"type": "text", "text": "go on"}]}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_tokens=1).choices


def test_a_chat_as_a_stream(client: openai.OpenAI, expected: Any) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True},
        logprobs=True,
    )  # fmt: skip
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected.text
    assert sum(len(one.choices[0].logprobs.content) for one in chunks if one.choices[0].logprobs) == 12
    assert [one.choices[0].finish_reason for one in chunks][-1] == "length"
    assert all(one.usage is None for one in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert len({one.id for one in chunks}) == 1


def test_the_helper_for_streams_puts_a_chat_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HI, max_tokens=12, temperature=0, logit_bias={"65": 90, "257": 100},
        extra_body={"min_tokens": 3},
    ) as stream:  # fmt: skip
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert ("".join(deltas), final.message.content, final.finish_reason) == ("AAA", "AAA", "stop")


def test_samples_and_seeds(client: openai.OpenAI) -> None:
    def ask(seed: int | None, n: int = 3) -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=HI, n=n, seed=seed, max_tokens=8, temperature=2.0, top_p=0.9
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content or "" for choice in answer.choices]

    assert ask(7) == ask(7)
    assert len(set(ask(7))) > 1
    assert ask(7) != ask(8)


def test_stops_and_biases(client: openai.OpenAI) -> None:
    forced = {"model": MODEL, "messages": HI, "max_tokens": 9, "temperature": 0, "logit_bias": {"65": 100}}
    assert client.chat.completions.create(**forced).choices[0].message.content == "A" * 9
    for stop in ("AAA", ["zzz", "AAA"]):
        choice = client.chat.completions.create(**forced, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("", "stop")
    penalized = client.chat.completions.create(**forced | {"logit_bias": {"65": 40}}, frequency_penalty=2.0)
    assert penalized.choices[0].message.content[0] == "A"


# -- completions --------------------------------------------------------------------------------------------------


def test_completions_of_text_tokens_and_batches(client: openai.OpenAI, tiny: LoadedModel) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0, **more)
        assert answer.object == "text_completion"
        return [choice.text for choice in answer.choices]

    one, other = tiny.tokenizer.encode("one"), tiny.tokenizer.encode("other")
    assert texts("one") == texts(["one"]) == texts(one) == texts([one])
    assert texts(["one", "other"]) == texts([one, other]) == texts("one") + texts("other")
    assert texts(["one", "other"], n=2) == [*texts("one") * 2, *texts("other") * 2]


def test_completions_tell_log_probabilities(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=MODEL, prompt="hi", max_tokens=5, temperature=0, logprobs=3).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 5
    assert [max(top.values()) for top in told.top_logprobs] == told.token_logprobs  # greedy: none is likelier
    assert all(here <= there for here, there in pairwise(told.text_offset))


def test_a_completion_as_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 10, "temperature": 0, "n": 2, "seed": 1}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    with client.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = list(stream)
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 20


# -- caches, strategies, models ------------------------------------------------------------------------------------


def test_usage_tells_what_was_cached(client: openai.OpenAI) -> None:
    def details(**extra: Any) -> tuple[int, int]:
        answer = client.completions.create(model=MODEL, prompt=LONG, max_tokens=1, extra_body=extra)
        told = answer.usage.prompt_tokens_details
        return told.cached_tokens, told.cache_write_tokens  # type: ignore[attr-defined]

    assert details(cache_salt="one") == (0, 64)
    assert details(cache_salt="one") == (64, 0)
    assert details(cache_salt="one", prompt_cache_key="k", session_id="s", attest=True) == (64, 0)
    assert details(cache_salt="two") == (0, 64)
    assert details(cache_salt="one", prompt_cache_options={"mode": "explicit"}) == (0, 0)
    assert details(cache_salt="one", strategy="full") == (0, 0)


def test_the_clients_own_cache_fields_act(client: openai.OpenAI, locked: Served) -> None:
    found: list[Generate] = []
    submit = locked.service.submit
    locked.service.submit = lambda one: (found.append(one), submit(one))[1]  # type: ignore[method-assign,assignment,return-value]
    try:
        client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=1, prompt_cache_key="k", prompt_cache_retention="24h"
        )
        client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=1, extra_headers={"X-Session-ID": "s"}, top_p=0.5,
            extra_body={"strategy": "full", "prompt_cache_options": {"ttl": "30m"}, "top_k": 3, "min_p": 0.1},
        )  # fmt: skip
    finally:
        del locked.service.submit
    first, second = found
    assert (first.session, first.ttl.absolute_s, first.strategy) == ("key:k", 86400.0, None)
    assert (second.session, second.ttl.idle_s, second.strategy) == ("s", 1800.0, "full")
    assert (second.params.top_p, second.params.top_k, second.params.min_p) == (0.5, 3, 0.1)  # type: ignore[union-attr]


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, listed.owned_by, listed.created) == (MODEL, "model", "kvwise", 1_700_000_000)
    assert client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


# -- errors -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = [
    ({"model": "gpt-4o"}, openai.NotFoundError, "model", "model_not_found"),
    ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
    ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError, "messages",
     "context_length_exceeded"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools", "invalid_value"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "invalid_value"),
    ({"extra_body": {"grammar": "x"}}, openai.BadRequestError, "grammar", "unknown_parameter"),
    ({"extra_body": {"strategy": "h2o(budget=0.1)"}}, openai.BadRequestError, "strategy", None),
    ({"extra_headers": {"Authorization": "Bearer sk-other"}}, openai.AuthenticationError, None, "invalid_api_key"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "kind", "param", "code"), REFUSED)
def test_errors_are_the_clients_own(
    client: openai.OpenAI, fields: Any, kind: Any, param: str | None, code: str | None, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 4, "stream": stream} | fields)
    error = caught.value
    assert type(error) is kind
    assert (error.param, error.code) == (param, code)
    assert error.request_id
    assert error.body["message"]  # type: ignore[index]


def test_what_the_client_may_ask_elsewhere_is_a_404(client: openai.OpenAI) -> None:
    for ask in (lambda: client.embeddings.create(model=MODEL, input="x"), lambda: client.files.list(),
                lambda: client.responses.create(model=MODEL, input="x")):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "route_not_found"


def test_a_full_queue_is_a_rate_limit_that_says_when(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused twice, then served: the client waits as long as it is told, and tries again by itself."""
    pauses = without_pauses(monkeypatch)
    with serving(make_server(tiny, limits=ServiceLimits(max_waiting=1))) as served:
        seen: list[httpx.Response] = []
        waiting = iter([(1, 500), (1, 500)])
        monkeypatch.setattr(type(served.service), "num_waiting", property(lambda self: next(waiting, (0, 0))))
        with retrying(served, seen) as client:
            assert client.completions.create(model=MODEL, prompt="hi", max_tokens=2).choices
        assert [one.status_code for one in seen] == [429, 429, 200]
        assert pauses == [float(one.headers["retry-after"]) for one in seen[:2]]
        waiting = iter([(1, 500)])
        with retrying(served, seen, retries=0) as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="hi", max_tokens=2)
    assert caught.value.code == "overloaded"


def test_a_quota_says_when_in_milliseconds(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = without_pauses(monkeypatch)
    file = key_file(tmp_path, alice=KEY, limits="requests_per_minute = 1\n")
    with serving(make_server(tiny, settings={"keys_file": file})) as served:
        seen: list[httpx.Response] = []
        with retrying(served, seen, retries=1) as client:
            client.completions.create(model=MODEL, prompt="hi", max_tokens=1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="hi", max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert [one.status_code for one in seen] == [200, 429, 429]
    assert seen[0].headers["x-ratelimit-remaining-requests"] == "0"
    assert pauses == [int(seen[1].headers["retry-after-ms"]) / 1000]
    assert 0 < pauses[0] <= 60


def test_a_server_that_drains_is_tried_again(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = without_pauses(monkeypatch)
    with serving(make_server(tiny), ready=False) as served:
        seen: list[httpx.Response] = []
        with retrying(served, seen, retries=1) as client, pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="hi", max_tokens=1)
    assert (caught.value.status_code, caught.value.code) == (503, "server_starting")
    assert pauses == [float(seen[0].headers["retry-after"])]


def test_an_error_in_the_middle_of_a_stream_is_raised(tiny: LoadedModel) -> None:
    with serving(make_server(tiny)) as served:
        service = served.service

        async def cut() -> None:
            for stream in service.streams():
                stream.abort()

        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            stream = client.completions.create(model=MODEL, prompt="hi", max_tokens=3000, stream=True)
            assert next(iter(stream)).choices
            served.on_loop(cut)
            with pytest.raises(openai.APIError) as caught:
                list(stream)
        assert caught.value.code == "request_aborted"


def test_a_stream_that_is_closed_ends_its_request(client: openai.OpenAI, locked: Served) -> None:
    stream = client.completions.create(model=MODEL, prompt="hi", max_tokens=240, stream=True)
    assert next(iter(stream)).choices
    stream.close()

    async def rest() -> int:
        async with asyncio.timeout(30):
            while locked.service.streams():
                await asyncio.sleep(0)
        return await locked.service.call(lambda engine: engine.memory.cache.usage().num_referenced)

    assert locked.on_loop(rest) == 0


# -- async --------------------------------------------------------------------------------------------------------


def test_the_async_client(locked: Served, expected: Any) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            ask: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0}
            answers = await asyncio.gather(*(client.chat.completions.create(**ask) for _ in range(8)))
            assert {one.choices[0].message.content for one in answers} == {expected.text}
            stream = await client.chat.completions.create(**ask, stream=True)
            assert "".join([one.choices[0].delta.content or "" async for one in stream]) == expected.text
            batch = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2)
            assert len(batch.choices) == 2
            assert [one.id async for one in client.models.list()] == [MODEL]
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**ask | {"n": 65})
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**ask | {"top_logprobs": 3}, stream=True)

    asyncio.run(main())
