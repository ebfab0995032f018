"""`POST /tokenize` and `POST /detokenize`, as vLLM's."""

from fastapi import APIRouter

from kvwise.server.api.answers import DetokenizeAnswer, TokenizeAnswer
from kvwise.server.api.deadline import within
from kvwise.server.api.logprobs import name
from kvwise.server.api.prompts import TEMPLATE_S, Prompt, chat_prompt, text_prompt
from kvwise.server.api.routing import require_model
from kvwise.server.api.schema import DetokenizeRequest, TokenizeRequest
from kvwise.server.context import Server
from kvwise.server.errors import ApiError
from kvwise.server.gates import known
from kvwise.server.strict import gated


def routes(server: Server) -> APIRouter:
    """The routes."""
    router = APIRouter(route_class=gated(known(server)))
    tokenizer = server.service.loaded.tokenizer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        """Token ids of a text, or of a conversation as the model's template writes it."""
        require_model(server, body.model)
        tokens = (await _prompt(server, body)).tokens
        strings = [name(tokenizer.token_bytes(token)) for token in tokens] if body.return_token_strs else None
        most = server.service.max_request_tokens()
        return TokenizeAnswer(count=len(tokens), max_model_len=most, tokens=tokens, token_strs=strings)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        """The text of token ids, special ones by their names."""
        require_model(server, body.model)
        vocab_size = server.service.loaded.vocab_size
        if (strange := next((token for token in body.tokens if token >= vocab_size), None)) is not None:
            raise ApiError(400, f"token id {strange} is outside the vocabulary of {vocab_size} tokens", param="tokens")
        text = await within(TEMPLATE_S, lambda: tokenizer.decode(body.tokens, skip_special=False))
        return DetokenizeAnswer(prompt=text)

    return router


async def _prompt(server: Server, body: TokenizeRequest) -> Prompt:
    if body.messages is not None:
        return await chat_prompt(server, body.messages)
    assert body.prompt is not None
    return await text_prompt(server, body.prompt, add_special=body.add_special_tokens is not False)
