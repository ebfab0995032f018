"""Completions: every shape of a prompt, batches and samples in order, log-probabilities, usage, the engine's tokens."""

from typing import Any

import httpx
import openai
import pytest

from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from tests.server.asgi import post as send

PROMPTS = ["The quick brown fox", "größer als 東京 🙂", "a"]


@pytest.fixture
def client(served: Any) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def post(served: Any, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0, **fields}
    return send(f"{served.url}/v1/completions", body)


def test_greedy_answers_are_the_engines(tiny: Any, client: Any) -> None:
    with LLM(tiny, "full+prefix", kv_cache_memory_bytes=2**24) as llm:
        expected = llm.generate(PROMPTS, SamplingParams(max_tokens=20, logprobs=0))
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=20, temperature=0, logprobs=0)
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == [str(one.finish_reason) for one in expected]
    for choice, one in zip(answer.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx([p.logprob for p in one.logprobs], abs=1e-5)
        assert len(choice.logprobs.tokens) == len(one.token_ids)


def test_every_shape_of_a_prompt(served: Any, tiny: Any) -> None:
    ids = [tiny.tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = post(served, prompt=PROMPTS).json()["choices"]
    assert post(served, prompt=ids).json()["choices"] == texts
    for prompt, tokens, choice in zip(PROMPTS, ids, texts, strict=True):
        assert post(served, prompt=prompt).json()["choices"] == [{**choice, "index": 0}]
        assert post(served, prompt=tokens).json()["choices"] == [{**choice, "index": 0}]


def test_samples_of_a_batch_are_numbered_prompt_by_prompt(served: Any) -> None:
    both = post(served, prompt=["abc", "xyz"], n=3, temperature=1, seed=5).json()
    assert [choice["index"] for choice in both["choices"]] == list(range(6))
    for number, prompt in enumerate(["abc", "xyz"]):
        alone = post(served, prompt=prompt, n=3, temperature=1, seed=5).json()["choices"]
        assert [one["text"] for one in both["choices"][3 * number : 3 * number + 3]] == [one["text"] for one in alone]
    assert both["usage"]["prompt_tokens"] == 8  # each prompt once, however many samples
    assert both["usage"]["completion_tokens"] == 48


def test_log_probabilities(served: Any) -> None:
    choice = post(served, prompt="größer", logprobs=3, max_tokens=30, temperature=1.5, seed=1).json()["choices"][0]
    told = choice["logprobs"]
    assert {len(column) for column in told.values()} == {30}
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob  # the chosen one is always among them
        assert 3 <= len(top) <= 4
    for token, start in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][start : start + len(token)] in (token, "")
    assert told["text_offset"] == sorted(told["text_offset"])
    assert post(served).json()["choices"][0]["logprobs"] is None


def test_usage_tells_what_was_found_and_what_was_written(served: Any) -> None:
    prompt = list(range(70))  # four full blocks and six tokens
    first, second = (post(served, prompt=prompt, cache_salt="mine").json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 64}
    assert second["prompt_tokens_details"] == {"cached_tokens": 64, "cache_write_tokens": 0}
    assert (second["prompt_tokens"], second["completion_tokens"], second["total_tokens"]) == (70, 8, 78)


def test_the_limit_of_the_context_is_exact(serve_http: Any) -> None:
    served = serve_http(kv_cache_memory_bytes=2**20)
    most = served.service.max_request_tokens()
    fits = post(served, prompt=[5] * (most - 2), max_tokens=2, ignore_eos=True)
    assert fits.json()["usage"]["total_tokens"] == most
    beyond = post(served, prompt=[5] * (most - 2), max_tokens=3)
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (400, "context_length_exceeded")
    full = post(served, prompt=[5] * most, max_tokens=None)
    assert (full.status_code, full.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert full.json()["error"]["param"] == "prompt"


def test_sixteen_tokens_unless_told(served: Any) -> None:
    assert post(served, max_tokens=None, ignore_eos=True).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1, "a"], [1, True], [1.0], [-1], [10**6], [[1], "a"], {"a": 1}, None, 3, [[1], []]]
)  # fmt: skip
def test_odd_prompts_are_refused(served: Any, prompt: Any) -> None:
    answer = post(served, prompt=prompt)
    if prompt == "":
        assert answer.json()["usage"]["prompt_tokens"] == 1  # this tokenizer begins every text with a token
        return
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_models_are_listed_and_others_are_not_found(served: Any, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvwise"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4/x")
    assert error.value.code == "model_not_found"
    assert post(served, model="gpt-4").json()["error"]["code"] == "model_not_found"


def test_text_and_tokens_and_back(served: Any) -> None:
    def call(route: str, **body: Any) -> Any:
        return send(f"{served.url}/{route}", body).json()

    told = call("tokenize", prompt="é!", return_token_strs=True)
    assert (told["count"], told["tokens"]) == (4, [256, 0xC3, 0xA9, 0x21])
    assert told["token_strs"] == ["<|256|>", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert told["max_model_len"] == served.service.max_request_tokens()
    assert call("tokenize", prompt="é!", add_special_tokens=False)["count"] == 3
    chat = call("tokenize", messages=[{"role": "user", "content": "hi"}])
    assert call("detokenize", tokens=chat["tokens"]) == {"prompt": "<|256|>user: hi\nassistant: "}
    assert call("detokenize", tokens=[10**6])["error"]["param"] == "tokens"
    assert call("tokenize", model="x", prompt="a")["error"]["code"] == "model_not_found"
    assert call("tokenize")["error"]["param"] == "prompt"
