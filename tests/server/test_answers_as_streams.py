"""Streams: the order of their chunks, what they add up to, keep-alives, errors in the middle, and no chunk too many."""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.server.asgi import Asked, pace, running, settled
from tests.server.asgi import post as send

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "größer als 東京 🙂?"}]


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": HI} if path == CHAT else {"prompt": "größer"}
    return {"model": "tiny", "max_tokens": 12, "temperature": 0, **prompt, **fields}


def events(served: Any, path: str, **fields: Any) -> list[Any]:
    answer = send(served.url + path, body(path, stream=True, **fields))
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_chat_is_role_deltas_finish_usage_done(served: Any) -> None:
    *chunks, done = events(served, CHAT, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *middle])
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in events(served, CHAT)[:-1])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.2, "seed": 3}, {"logprobs": 1}, {"stop": ["W", "="]},
                                    {"attest": True}])  # fmt: skip
def test_chunks_add_up_to_the_whole_answer(served: Any, path: str, fields: Any) -> None:
    if path == CHAT and "logprobs" in fields:
        fields = {"logprobs": True, "top_logprobs": 1}
    whole = send(served.url + path, body(path, **fields)).json()
    chunks = [event for event in events(served, path, **fields) if event != "[DONE]"]
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        texts = [one["delta"].get("content", "") if path == CHAT else one["text"] for one in mine]
        assert "".join(texts) == (expected["message"]["content"] if path == CHAT else expected["text"])
        assert [one["finish_reason"] for one in mine][-1] == expected["finish_reason"]
        assert ("kvwise" in mine[-1]) == ("kvwise" in expected) == ("attest" in fields)
        if "logprobs" in fields:
            told = [one["logprobs"] for one in mine if one["logprobs"] is not None]
            for column, values in expected["logprobs"].items():
                if values is not None:
                    assert [value for one in told for value in one[column]] == values


def test_a_batch_streams_every_prompt(served: Any) -> None:
    whole = send(served.url + COMPLETIONS, body(COMPLETIONS, prompt=["ab", "cd", "ef"], n=2, seed=1)).json()
    chunks = events(served, COMPLETIONS, prompt=["ab", "cd", "ef"], n=2, seed=1)[:-1]
    for expected in whole["choices"]:
        texts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(texts) == expected["text"]


def test_openais_clients_read_streams(served: Any) -> None:
    plain = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    whole = plain.chat.completions.create(**body(CHAT)).choices[0].message.content
    ends = body(CHAT, stop=whole[6])  # the helper wants an answer that ends by itself
    expected = whole[: whole.index(whole[6])]
    with plain.chat.completions.stream(**ends) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected

    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            chunks = await client.chat.completions.create(stream=True, **ends)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(main()) == expected


def test_what_a_stream_is_refused_for_has_its_status(served: Any) -> None:
    answer = send(served.url + CHAT, body(CHAT, stream=True, max_tokens=10**6))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_silent_stream_is_kept_alive_by_comments(make: Any, path: str) -> None:
    async def main() -> None:
        server = make(settings={"sse_keep_alive_s": 0.01})
        async with running(server) as app:
            steps = await pace(server)
            asked = Asked(app, path, body(path, stream=True))
            await asked.until(lambda one: one.body.count(b": keep-alive\n\n") > 1)
            assert asked.status == 200
            steps.allow(float("inf"))
            await asked.done()
            assert asked.events[-1] == "[DONE]"
            await settled(server)

    asyncio.run(main())


def test_a_first_token_is_told_though_it_is_half_a_character(make: Any) -> None:
    async def main() -> None:
        server = make()
        async with running(server) as app:
            steps = await pace(server)
            half = {"logit_bias": {"195": 100}, "ignore_eos": True}  # a byte that begins a character
            asked = Asked(app, COMPLETIONS, body(COMPLETIONS, stream=True, **half))
            steps.allow(1)
            await asked.until(lambda one: bool(one.events))
            assert asked.events[0]["choices"][0]["text"] == ""
            steps.allow(float("inf"))
            await asked.done()
            texts = [one["choices"][0]["text"] for one in asked.events[:-1]]
            assert set("".join(texts)) == {"\ufffd"}
            assert all(texts[1:])

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_tells_nothing_of_itself(make: Any, stream: bool, caplog: Any) -> None:
    async def main() -> None:
        server = make()
        async with running(server) as app:
            steps = await pace(server)
            asked = Asked(app, CHAT, body(CHAT, stream=stream, ignore_eos=True))
            steps.allow(3)
            if stream:
                await asked.until(lambda one: len(one.events) > 2)

            def fail() -> Any:
                raise RuntimeError("secret internals")

            steps._step = fail
            steps.allow(1)
            await asked.done()
            error = asked.events[-1]["error"] if stream else asked.json["error"]
            assert asked.status == (200 if stream else 500)
            assert error["code"] == "internal_error"
            assert b"secret" not in asked.body
            assert b"[DONE]" not in asked.body
            assert asked.complete
        assert "secret internals" in caplog.text  # where the operator finds it

    asyncio.run(main())


def test_news_that_nobody_took_come_in_one_chunk(make: Any) -> None:
    """A chunk for each step while the client reads; all that came meanwhile in one, once it reads again."""

    async def main() -> None:
        server = make()
        async with running(server) as app:
            asked = Asked(app, COMPLETIONS, body(COMPLETIONS, stream=True, max_tokens=60, ignore_eos=True))
            await asked.until(lambda one: bool(one.events))
            asked.reads.clear()
            await settled(server)
            asked.reads.set()
            await asked.done()
            assert len(asked.events) < 60
            assert asked.events[-2]["choices"][0]["finish_reason"] == "length"

    asyncio.run(main())
