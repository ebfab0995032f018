"""`POST /v1/completions`."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from kvwise.engine.stream import News
from kvwise.models.text import Tokenizer
from kvwise.server.api.answering import Attest, attest, finish_reason, respond
from kvwise.server.api.answers import CompletionAnswer
from kvwise.server.api.caching import caching, session_header
from kvwise.server.api.generation import Order
from kvwise.server.api.logprobs import CompletionLogprobs
from kvwise.server.api.prompts import Prompt, text_prompt
from kvwise.server.api.routing import admit, chosen_strategy, generating, new_id
from kvwise.server.api.sampling import COMPLETION_TOKENS, output_limit, sampling_params
from kvwise.server.api.schema import CompletionRequest
from kvwise.server.api.sse import STREAM, dumps
from kvwise.server.context import Server
from kvwise.server.errors import ApiError


def routes(server: Server) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=generating(server))

    @router.post("/v1/completions", response_model=None, responses={200: {"model": CompletionAnswer, **STREAM}})
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue a prompt, or several, as OpenAI's API does."""
        record = admit(server, request, body)
        cache = caching(body, session_header(request))
        strategy = chosen_strategy(server, request.state.tenant, body.strategy)
        prompts = await _prompts(server, body.prompt)
        most = server.service.max_request_tokens(strategy)
        loaded = server.service.loaded
        params = [
            sampling_params(body, max_tokens=limit, logprobs=body.logprobs, vocab_size=loaded.vocab_size)
            for limit in (
                output_limit(
                    body.max_tokens, default=COMPLETION_TOKENS, num_prompt=len(one.tokens), most=most, param="prompt"
                )
                for one in prompts
            )
        ]
        order = Order(new_id("cmpl"), prompts, params, cache, strategy=strategy, priority=body.priority or 0)
        form = _Completion(loaded.tokenizer, attest(server, body), logprobs=body.logprobs is not None)
        return await respond(server, request, body, order, record, form)

    return router


async def _prompts(server: Server, given: list[str] | list[list[int]]) -> Sequence[Prompt]:
    """Each prompt of a batch. ApiError 400 for too many, for none, and for ids that the vocabulary does not have."""
    if len(given) > server.settings.max_prompts:
        most = server.settings.max_prompts
        raise ApiError(400, f"{len(given)} prompts are more than {most}, the limit", param="prompt")
    prompts: list[Prompt] = []
    for one in given:
        if prompts:
            await asyncio.sleep(0)  # a batch of many texts does not hold up the others
        prompts.append(await text_prompt(server, one) if isinstance(one, str) else _ids_prompt(server, one))
    if any(not one.tokens for one in prompts):
        raise ApiError(400, "a prompt is empty: give at least one token", param="prompt")
    return prompts


def _ids_prompt(server: Server, ids: list[int]) -> Prompt:
    vocab_size = server.service.loaded.vocab_size
    if (largest := max(ids)) >= vocab_size:
        raise ApiError(400, f"token id {largest} is outside the vocabulary of {vocab_size} tokens", param="prompt")
    return Prompt(ids)


class _Completion:
    """How completions are written; chunks and whole answers have one shape."""

    object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, attest: Attest, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._attest = attest
        self._logprobs = logprobs
        self._told: dict[int, CompletionLogprobs] = {}  # by sample: offsets go on from chunk to chunk
        self._begun: set[int] = set()  # samples

    def opening(self, index: int) -> str | None:
        """None."""
        return None

    def piece(self, index: int, news: News) -> str | None:
        """A piece of text; the last one is told by `closing`.

        The first one also while it is empty, which half a character is: it tells that there is a first token.
        """
        if news.finish_reason is not None or (index in self._begun and not (news.text or news.logprobs)):
            return None
        self._begun.add(index)
        logprobs = dumps(self._logprobs_of(index, news)) if self._logprobs else "null"
        return f'{{"index":{index},"text":{dumps(news.text)},"logprobs":{logprobs},"finish_reason":null}}'

    def closing(self, index: int, end: News) -> str:
        """The last piece of text."""
        return dumps(self.choice(index, end))

    def choice(self, index: int, news: News) -> dict[str, Any]:
        """A whole sample, or the last piece of it."""
        logprobs = self._logprobs_of(index, news) if self._logprobs else None
        choice = {"index": index, "text": news.text, "logprobs": logprobs, "finish_reason": finish_reason(news)}
        return choice | self._attest.of(news)

    def _logprobs_of(self, index: int, news: News) -> dict[str, Any]:
        if index not in self._told:
            self._told[index] = CompletionLogprobs(self._tokenizer)
        return self._told[index].add(news.logprobs)
