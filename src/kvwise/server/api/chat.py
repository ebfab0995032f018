"""`POST /v1/chat/completions`."""

from typing import Any

from fastapi import APIRouter, Request, Response

from kvwise.engine.stream import News
from kvwise.models.text import Tokenizer
from kvwise.server.api.answering import Attest, attest, finish_reason, respond
from kvwise.server.api.answers import ChatAnswer
from kvwise.server.api.caching import caching, session_header
from kvwise.server.api.generation import Order
from kvwise.server.api.logprobs import chat_logprobs
from kvwise.server.api.prompts import chat_prompt
from kvwise.server.api.routing import admit, chosen_strategy, generating, new_id
from kvwise.server.api.sampling import output_limit, sampling_params
from kvwise.server.api.schema import ChatRequest
from kvwise.server.api.sse import STREAM, dumps
from kvwise.server.context import Server


def routes(server: Server) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=generating(server))

    @router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatAnswer, **STREAM}})
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        record = admit(server, request, body)
        cache = caching(body, session_header(request))
        strategy = chosen_strategy(server, request.state.tenant, body.strategy)
        prompt = await chat_prompt(server, body.messages, strategy)
        most = server.service.max_request_tokens(strategy)
        limit = output_limit(
            body.max_tokens or body.max_completion_tokens, default=None, num_prompt=len(prompt.tokens), most=most,
            param="messages",
        )  # fmt: skip
        loaded = server.service.loaded
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling_params(body, max_tokens=limit, logprobs=logprobs, vocab_size=loaded.vocab_size)
        order = Order(
            new_id("chatcmpl"), [prompt], [params], cache, strategy=strategy, priority=body.priority or 0,
            param="messages",
        )  # fmt: skip
        form = _Chat(loaded.tokenizer, attest(server, body), logprobs=logprobs is not None)
        return await respond(server, request, body, order, record, form)

    return router


class _Chat:
    """How chats are written."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, attest: Attest, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._attest = attest
        self._logprobs = logprobs

    def opening(self, index: int) -> str | None:
        """Tells the role."""
        return (
            f'{{"index":{index},"delta":{{"role":"assistant","content":"","refusal":null}},"logprobs":null,'
            '"finish_reason":null}'
        )

    def piece(self, index: int, news: News) -> str | None:
        """A delta."""
        if not news.text and not news.logprobs:
            return None
        logprobs = dumps(self._told(news)) if self._logprobs else "null"
        return (
            f'{{"index":{index},"delta":{{"content":{dumps(news.text)}}},"logprobs":{logprobs},"finish_reason":null}}'
        )

    def closing(self, index: int, end: News) -> str:
        """An empty delta."""
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason(end)}
        return dumps(choice | self._attest.of(end))

    def choice(self, index: int, news: News) -> dict[str, Any]:
        """A whole message."""
        message: dict[str, Any] = {"role": "assistant", "content": news.text, "refusal": None, "annotations": []}
        choice = {"index": index, "message": message, "logprobs": self._told(news) if self._logprobs else None}
        return choice | {"finish_reason": finish_reason(news)} | self._attest.of(news)

    def _told(self, news: News) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, news.logprobs)
