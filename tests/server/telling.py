"""What tests of the observers need: records, requests that tell a server's observers, and the page read back."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvwise.core.output import Attestation, LoadReport, RequestMetrics
from kvwise.core.params import SamplingParams
from kvwise.engine.service import Generate
from kvwise.server.context import Server
from kvwise.server.record import RequestRecord

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def a_record(**told: Any) -> RequestRecord:
    """A streaming chat request of 100 tokens that arrived at 10 s and ended well at 12 s, unless told otherwise."""
    known = {
        "request_id": "chatcmpl-1", "route": "/v1/chat/completions", "tenant": "acme", "model": "tiny",
        "strategy": "prefix", "streams": True, "arrival": 10.0, "num_prompt": 100, "num_output": 3, "status": 200,
        "finish_reasons": ["stop"], "first_token": 10.5, "finished": 12.0,
        "metrics": [some_metrics()], "attestations": [Attestation("prefix")],
    }  # fmt: skip
    return RequestRecord(**(known | told))


def some_metrics(**told: Any) -> RequestMetrics:
    """Arrived at 10 s, 0.1 s in the queue, 0.4 s of prefill, then a token each 0.75 s."""
    known = {"first_scheduled": 10.1, "first_token": 10.5, "finished": 12.0, "token_times": [10.5, 11.25, 12.0]}
    return RequestMetrics(10.0, **(known | told))


def a_load(decision: str) -> LoadReport:
    return LoadReport(decision, 16, 16)


@asynccontextmanager
async def started(server: Server) -> Any:
    """The server's engines step, and take requests."""
    await server.service.start()
    server.service.ready()
    try:
        yield server.service
    finally:
        await server.service.close()


async def ask(
    server: Server, prompt: Sequence[int], params: SamplingParams = GREEDY, *, strategy: str | None = None,
    streams: bool = True, tenant: str = "",
) -> RequestRecord:  # fmt: skip
    """One request, as the routes make it: all observers are told what they should be."""
    service, clock = server.service, server.service.clock
    name = service.new_id("test")
    stream = service.submit(Generate(prompt, params, name, strategy=strategy, tenant=tenant))
    record = RequestRecord(
        name, "/v1/completions", "", "tiny", stream.strategy, streams, stream.arrival, num_prompt=len(prompt)
    )
    for observer in server.observers:
        observer.accepted(record)
    async for news in stream:
        now = clock.now()
        record.num_output += len(news.token_ids)
        if news.token_ids:
            record.first_token = now if record.first_token is None else record.first_token
            for observer in server.observers:
                observer.tokens(record, len(news.token_ids), now)
        if news.finish_reason is not None:
            assert news.metrics is not None
            assert news.attestation is not None
            record.finish_reasons.append(str(news.finish_reason))
            record.metrics.append(news.metrics)
            record.attestations.append(news.attestation)
    record.status, record.finished = 200, clock.now()
    for observer in server.observers:
        observer.ended(record)
    return record


def read(page: bytes | str) -> dict[str, float]:
    """`name{label="value",...}` -> value of every sample, without model name and engine 0. None comes twice."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page if isinstance(page, str) else page.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name" and (k, v) != ("engine", "0")}
            name = sample.name + (
                "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}" if labels else ""
            )
            assert name not in found, name
            found[name] = sample.value
    return found


async def until(ready: Callable[[], bool]) -> None:
    """Let others run until something has happened on the engine's thread."""
    async with asyncio.timeout(30):
        while not ready():
            await asyncio.sleep(0.002)
