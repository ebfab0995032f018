"""LiteLLM works unchanged, and without the network: the model's prices, which it would fetch, come with it."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from kvwise.models.loaded import LoadedModel
from tests.server.conftest import MODEL, Served, make_server, only_loopback, serving

pytestmark = [  # LiteLLM uses pydantic in ways that pydantic warns of, when the first answers come
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class .* is using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*' attribute on the instance:DeprecationWarning"),
]
KEY = "sk-of-litellm"
HI = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]
TOKENS = 10


@pytest.fixture(scope="module")
def locked(tiny: LoadedModel) -> Iterator[Served]:
    with serving(make_server(tiny, api_keys=[KEY])) as one:
        yield one


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LITELLM_MODE", "PRODUCTION")  # reads no .env file
        with only_loopback():
            import litellm  # takes seconds: only for these tests

        patch.setattr(litellm, "suppress_debug_info", True)
        yield litellm


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """LiteLLM asks for the thread's event loop also where it is not asynchronous, and would leave a new one open."""
    with contextlib.closing(asyncio.new_event_loop()) as one:
        asyncio.set_event_loop(one)
        yield one
        asyncio.set_event_loop(None)


@pytest.fixture
def ask(locked: Served, loopback_only: list[Any], loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """What every call has; a call that reaches for anything but the loopback fails."""
    return {
        "model": f"openai/{MODEL}", "api_base": f"{locked.url}/v1", "api_key": KEY, "messages": HI, "temperature": 0,
        "max_tokens": TOKENS, "timeout": 60, "num_retries": 0, "max_retries": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel) -> str:
    with LLM(tiny, "full+prefix", kv_cache_memory_bytes=2**24) as llm:
        return str(llm.generate([tiny.tokenizer.chat(HI)], SamplingParams(max_tokens=TOKENS))[0].text)


def test_completion(litellm: Any, ask: dict[str, Any], expected: str) -> None:
    first, second = litellm.completion(**ask), litellm.completion(**ask)
    assert first.choices[0].message.content == second.choices[0].message.content == expected
    assert first.choices[0].finish_reason == "length"
    assert first.usage.completion_tokens == TOKENS
    assert second.usage.prompt_tokens_details.cached_tokens == 32


def test_streaming(litellm: Any, ask: dict[str, Any], expected: str) -> None:
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == expected
    assert chunks[-1].usage.completion_tokens == TOKENS
    whole = litellm.stream_chunk_builder(chunks, messages=HI)
    assert whole.choices[0].message.content == expected


def test_acompletion(litellm: Any, ask: dict[str, Any], expected: str, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        answers = await asyncio.gather(*(litellm.acompletion(**ask) for _ in range(3)))
        assert [one.choices[0].message.content for one in answers] == [expected] * 3
        stream = await litellm.acompletion(**ask, stream=True)
        assert "".join([one.choices[0].delta.content or "" async for one in stream]) == expected
        await litellm.close_litellm_async_clients()

    loop.run_until_complete(main())


def test_text_completion(litellm: Any, ask: dict[str, Any]) -> None:
    asked = {**ask, "model": f"text-completion-openai/{MODEL}", "prompt": ["a", "b"], "n": 2}
    del asked["messages"]
    answer = litellm.text_completion(**asked)
    assert len(answer.choices) == 4
    assert answer.usage.completion_tokens == 4 * TOKENS


def test_what_it_passes_on(litellm: Any, ask: dict[str, Any]) -> None:
    forced = litellm.completion(**ask, logit_bias={"65": 100}, stop=["AAAA"], seed=3, n=2, user="u", logprobs=True)
    assert [(one.message.content, one.finish_reason) for one in forced.choices] == [("", "stop")] * 2
    salted = {**ask, "extra_body": {"cache_salt": "mine", "top_k": 2}}
    cached = [litellm.completion(**salted).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert cached == [0, 32]


def test_errors_are_its_own(litellm: Any, ask: dict[str, Any]) -> None:
    cases = [
        ({"temperature": 3}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, litellm.ContextWindowExceededError),
        ({"model": "openai/gpt-4o"}, litellm.NotFoundError),
        ({"api_key": "sk-other"}, litellm.AuthenticationError),
        ({"response_format": {"type": "json_object"}}, litellm.BadRequestError),
    ]
    for fields, kind in cases:
        with pytest.raises(kind):
            litellm.completion(**{**ask, **fields})
