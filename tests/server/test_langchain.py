"""LangChain's ChatOpenAI works unchanged."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from kvwise.models.loaded import LoadedModel
from tests.server.conftest import MODEL, Served, make_server, serving

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

KEY = "sk-of-langchain"
TURNS = [("system", "be brief"), ("human", "hi there")]  # in LangChain's words
TOKENS = 10


@pytest.fixture(scope="module")
def locked(tiny: LoadedModel) -> Iterator[Served]:
    with serving(make_server(tiny, api_keys=[KEY])) as one:
        yield one


def connect(served: Served, **more: Any) -> "ChatOpenAI":
    from langchain_openai import ChatOpenAI  # takes seconds: only for these tests

    return ChatOpenAI(
        model=MODEL, base_url=f"{served.url}/v1", api_key=KEY, temperature=0, max_tokens=TOKENS, max_retries=0,
        timeout=60, stream_usage=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat(locked: Served) -> "Iterator[ChatOpenAI]":
    with httpx.Client() as http:  # its own would stay open for good
        yield connect(locked, http_client=http)


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel) -> str:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]
    with LLM(tiny, "full+prefix", kv_cache_memory_bytes=2**24) as llm:
        return str(llm.generate([tiny.tokenizer.chat(messages)], SamplingParams(max_tokens=TOKENS))[0].text)


def test_invoke(chat: "ChatOpenAI", expected: str) -> None:
    answer = chat.invoke(TURNS)
    assert answer.content == expected
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == MODEL
    usage = answer.usage_metadata
    assert (usage["output_tokens"], usage["total_tokens"]) == (TOKENS, usage["input_tokens"] + TOKENS)
    again = chat.invoke(TURNS)
    assert again.usage_metadata["input_token_details"]["cache_read"] == 32
    assert usage["input_token_details"]["cache_read"] <= 32
    assert chat.invoke([*TURNS, answer, ("human", "more")]).content


def test_stream(chat: "ChatOpenAI", expected: str) -> None:
    chunks = list(chat.stream(TURNS))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == expected
    assert whole.usage_metadata["output_tokens"] == TOKENS
    assert whole.response_metadata["finish_reason"] == "length"


def test_batch(chat: "ChatOpenAI", expected: str) -> None:
    answers = chat.batch([TURNS, "other", TURNS])
    assert [one.content == expected for one in answers] == [True, False, True]


def test_asynchronously(locked: Served, expected: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient() as http:
            chat = connect(locked, http_async_client=http)
            assert (await chat.ainvoke(TURNS)).content == expected
            assert "".join([str(one.content) async for one in chat.astream(TURNS)]) == expected
            assert [one.content for one in await chat.abatch([TURNS] * 3)] == [expected] * 3

    asyncio.run(main())


def test_what_it_passes_on(chat: "ChatOpenAI") -> None:
    forced: Any = chat.bind(logit_bias={"65": 100}, stop=["AAAA"], logprobs=True, top_logprobs=2)
    answer = forced.invoke(TURNS)
    assert (answer.content, answer.response_metadata["finish_reason"]) == ("", "stop")
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    salted: Any = chat.bind(extra_body={"cache_salt": "mine", "strategy": "full+prefix"})
    assert salted.invoke(TURNS).usage_metadata["input_token_details"]["cache_read"] == 0
    assert salted.invoke(TURNS).usage_metadata["input_token_details"]["cache_read"] == 32


def test_what_is_not_implemented_is_an_error_not_a_wrong_answer(chat: "ChatOpenAI") -> None:
    import openai

    tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}
    shape = {"title": "t", "description": "t", "type": "object", "properties": {"a": {"type": "string"}}}
    for asked in (chat.bind_tools([tool]), chat.with_structured_output(shape)):
        with pytest.raises(openai.BadRequestError):
            asked.invoke(TURNS)
    with pytest.raises(openai.NotFoundError):
        chat.bind(model="gpt-4o").invoke(TURNS)
