"""From an order to an answer, whole or as a stream."""

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response

from kvwise.core.output import FinishReason
from kvwise.engine.stream import News
from kvwise.server.api.generation import Generation, Order
from kvwise.server.api.schema import GenerationRequest
from kvwise.server.api.sse import EventStream, Format, Framing, dumps, nobody
from kvwise.server.api.usage import attested, usage
from kvwise.server.context import Server
from kvwise.server.record import RequestRecord


class Answer(Format, Protocol):
    """How one kind of answer is written: in chunks, or whole."""

    object: str
    chunk_object: str

    def choice(self, index: int, news: News) -> dict[str, Any]:
        """A whole sample."""
        ...


@dataclass(frozen=True, slots=True)
class Attest:
    """Whether, and how, choices tell what was done to their KV."""

    wanted: bool
    places: int  # layers and heads

    def of(self, end: News) -> dict[str, Any]:
        """What it adds to a choice."""
        return {"kvwise": attested(end.attestation, self.places)} if self.wanted and end.attestation else {}


def attest(server: Server, body: GenerationRequest) -> Attest:
    """As `body` asks."""
    loaded = server.service.loaded
    return Attest(bool(body.attest), loaded.num_layers * loaded.num_kv_heads)


def finish_reason(end: News) -> str:
    """In OpenAI's words; samples that ended otherwise have no choice."""
    return "stop" if end.finish_reason is FinishReason.STOP else "length"


async def respond(
    server: Server, request: Request, body: GenerationRequest, order: Order, record: RequestRecord, form: Answer
) -> Response:
    """Carry out an order. What it fails of before the answer begins is raised; of a stream, when that is called."""
    record.session = order.caching.session
    if server.settings.log_prompts:
        record.prompt = "\n".join(server.service.loaded.tokenizer.decode(one.tokens) for one in order.prompts)
    head = {"id": order.id, "object": form.object, "created": _now(), "model": server.model_names[0]}
    async with AsyncExitStack() as stack:
        generation = await stack.enter_async_context(Generation.submit(server, request, order, record))
        if body.stream:
            wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            framing = Framing(head | {"object": form.chunk_object}, include_usage=wants_usage)
            return EventStream(
                generation, stack.pop_all(), form, framing, keep_alive_s=server.settings.sse_keep_alive_s,
                send_s=server.settings.slow_reader_s,
            )  # fmt: skip
        samples = await generation.whole()
        if generation.disconnected:
            return nobody()
        record.status = 200
        generation.hand_over(sum(len(news.token_ids) for news in samples))
        answer = head | {"choices": _choices(form, samples), "usage": usage(generation.streams, generation.firsts)}
        return Response(dumps(answer), media_type="application/json", headers=dict(generation.headers))


def _choices(form: Answer, samples: Sequence[News]) -> list[dict[str, Any]]:
    return [form.choice(index, news) for index, news in enumerate(samples)]


def _now() -> int:
    return int(time.time())
