"""The one place that submits to the engine: quotas, the request's record, its client's leaving, its end."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from fastapi import Request

from kvwise.core.errors import CapacityError
from kvwise.core.output import FinishReason
from kvwise.core.params import SamplingParams
from kvwise.engine.service import Generate
from kvwise.engine.stream import News, Stream
from kvwise.server.api.caching import Caching
from kvwise.server.api.deadline import Patience
from kvwise.server.api.prompts import Prompt
from kvwise.server.api.sampling import refused_for_length
from kvwise.server.api.usage import cached_tokens
from kvwise.server.context import Server
from kvwise.server.errors import SERVER, ApiError, as_api_error
from kvwise.server.record import RequestRecord
from kvwise.server.tenancy.tenants import Lease, Tenant

_log = logging.getLogger(__name__)
_LAST_NEWS_S = 5.0  # that an end waits for what the engine says of an abort, so that quotas and records are exact
GONE = 499  # the status in records of a client that left before its answer began


@dataclass(frozen=True, slots=True)
class Order:
    """What a client's request comes to: prompts that share everything but how much they may generate."""

    id: str
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]  # of each prompt
    caching: Caching
    strategy: str | None = None
    priority: int = 0
    param: str = "prompt"  # the field that the prompts came in

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        return self.params[0].n

    def generates(self, tenant: Tenant) -> list[Generate]:
        """The engine's requests, one for each prompt."""
        session = tenant.session_key(self.caching.session)
        return [
            Generate(
                prompt.tokens, params, f"{self.id}-{number}", images=list(prompt.images), tenant=tenant.id,
                session=session, ttl=self.caching.ttl, cache_salt=self.caching.cache_salt,
                num_shareable=self.caching.num_shareable(prompt.breakpoints), priority=self.priority,
                strategy=self.strategy,
            )
            for number, (prompt, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]  # fmt: skip


class Generation:
    """An order on its way, from `submit` to the end of `async with`; when that ends, nothing of it runs any more.

    Samples are numbered through all prompts, those of the first prompt first. A client that leaves is noticed in any
    phase, and the order is aborted at once.
    """

    def __init__(
        self, server: Server, request: Request, order: Order, record: RequestRecord, streams: Sequence[Stream],
        lease: Lease,
    ) -> None:  # fmt: skip
        self.order = order
        self.record = record
        self.streams = streams
        self.ends: dict[int, News] = {}  # the last news of the samples that have ended
        self.headers: Mapping[str, str] = lease.headers
        self._server = server
        self._request = request
        self._lease = lease
        self._news: dict[int, News] = {}  # not taken yet
        self._wake = asyncio.Event()
        self._refusal: Exception | None = None
        self._watcher: asyncio.Task[None]
        for stream in streams:
            stream.wake(self._wake)

    @classmethod
    def submit(cls, server: Server, request: Request, order: Order, record: RequestRecord) -> "Generation":
        """Queue an order, all of it or nothing. ApiError, Overloaded, Unavailable or UsageError if that cannot be."""
        tenant: Tenant = request.state.tenant
        num_prompt = sum(len(prompt.tokens) for prompt in order.prompts)
        max_output = sum(params.max_tokens * params.n for params in order.params)
        num_samples = order.num_samples * len(order.prompts)
        lease = server.tenants.lease(tenant, num_prompt, max_output, num_samples=num_samples)
        streams: list[Stream] = []
        try:
            for one in order.generates(tenant):
                streams.append(server.service.submit(one))
        except BaseException as error:
            lease.finish(0)
            for stream in streams:
                stream.abort()
            if isinstance(error, CapacityError):
                raise refused_for_length(error, order.param) from None
            raise
        record.answer_id, record.num_prompt, record.strategy = order.id, num_prompt, streams[0].strategy
        for observer in server.observers:
            observer.accepted(record)
        return cls(server, request, order, record, streams, lease)

    # -- life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Generation":
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for stream in self.streams:
                stream.abort()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_NEWS_S):
                    await self._until_ended()
        finally:
            self._watcher.cancel()
            self._lease.finish(sum(stream.num_tokens for stream in self.streams))
            note_end(self._server, self.record, error)

    async def _watch(self) -> None:
        """Abort the order as soon as its client has left."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.record.disconnected = True
        for stream in self.streams:
            stream.abort()
        self._wake.set()

    async def _until_ended(self) -> None:
        self._take()
        while not all(stream.ended for stream in self.streams):
            await self._wake.wait()
            self._wake.clear()
            self._take()

    def _take(self) -> None:
        """Gather what is told of all prompts until somebody asks for it."""
        for number, stream in enumerate(self.streams):
            try:
                for news in stream.take():
                    self._gather(number * self.order.num_samples + news.index, news)
            except Exception as error:
                self._refusal = self._refusal or error

    def _gather(self, index: int, news: News) -> None:
        if news.finish_reason is not None:
            self._note_end_of(index, news)
        if index in self._news:
            self._news[index].add(news)
        else:
            self._news[index] = news

    def _note_end_of(self, index: int, end: News) -> None:
        record = self.record
        self.ends[index] = end
        if end.finish_reason is FinishReason.ERROR:
            _log.error("request %s failed: %s", record.request_id, end.error)
        record.finish_reasons.append(str(end.finish_reason))
        if end.metrics is not None and end.attestation is not None:
            record.metrics.append(end.metrics)
            record.attestations.append(end.attestation)
        if index % self.order.num_samples == 0:
            record.num_cached += cached_tokens(end)

    # -- news ---------------------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Samples of all prompts."""
        return self.order.num_samples * len(self.streams)

    @property
    def disconnected(self) -> bool:
        """Whether the client has left."""
        return self.record.disconnected

    @property
    def firsts(self) -> list[News]:
        """How the first sample of each prompt has ended; all samples must have."""
        return [self.ends[number * self.order.num_samples] for number in range(len(self.streams))]

    @property
    def failure(self) -> Exception | None:
        """Why there will be no whole answer, if that is so."""
        if self._refusal is not None:
            return self._refusal
        return next((reason for end in self.ends.values() if (reason := _failure_of(end))), None)

    async def begun(self, timeout_s: float) -> None:
        """Wait until there is something to tell, or for `timeout_s`; raises what the order fails of before that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._take()
        if not self.disconnected and (failure := self.failure) is not None:
            raise failure

    async def news(self, timeout_s: float | None) -> AsyncIterator[Mapping[int, News]]:
        """What there is, by sample, as it comes; nothing for `timeout_s`: an empty mapping.

        It ends when all samples have, or the client left; raises `failure`.
        """
        num_left = self.num_samples - len(self.ends)
        with contextlib.closing(Patience(timeout_s)) as patience:
            while num_left > 0 or self._news:
                with contextlib.suppress(TimeoutError), patience:
                    await self._wake.wait()
                self._wake.clear()
                self._take()
                taken, self._news = self._news, {}
                if self.disconnected:
                    return
                if (failure := self.failure) is not None:
                    raise failure
                yield taken
                num_left = self.num_samples - len(self.ends)

    async def whole(self) -> list[News]:
        """All of every sample, in order; raises `failure`. Short if the client left."""
        samples: dict[int, News] = {}
        async for taken in self.news(None):
            for index, news in taken.items():
                if index in samples:
                    samples[index].add(news)
                else:
                    samples[index] = news
        return [samples[index] for index in sorted(samples)]

    def hand_over(self, num_tokens: int) -> None:
        """So many tokens are on their way to the client."""
        if not num_tokens:
            return
        now, record = self._server.service.clock.now(), self.record
        record.first_token = now if record.first_token is None else record.first_token
        record.num_output += num_tokens
        for observer in self._server.observers:
            observer.tokens(record, num_tokens, now)


def _failure_of(end: News) -> ApiError | None:
    if end.finish_reason is FinishReason.ERROR:
        return ApiError(500, "the server failed on this request; its log says why", type=SERVER, code="internal_error")
    if end.finish_reason is FinishReason.ABORT:
        return ApiError(
            503, "the server ended this request before it was done: try again", type=SERVER, code="request_aborted",
            headers={"Retry-After": "1"},
        )  # fmt: skip
    return None


def note_end(server: Server, record: RequestRecord, error: BaseException | None) -> None:
    """A request is over, with an answer or with an error: tell the observers, once."""
    if record.finished is not None:
        return
    record.finished = server.service.clock.now()
    if record.disconnected:
        record.status, record.error = record.status or GONE, record.error or "client_disconnected"
    elif error is not None:
        answer = as_api_error(error if isinstance(error, Exception) else RuntimeError())
        record.status = record.status or answer.status
        record.error = answer.code or answer.type
    for observer in server.observers:
        observer.ended(record)
