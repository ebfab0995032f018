"""What a request's reader sees: news of its samples, gathered while nobody looks, in bounded memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from kvwise.core.output import Attestation, FinishReason, RequestMetrics, TokenLogprob


@dataclass(slots=True)
class News:
    """What has been added to one sample since its reader looked last. The end is told once, with the last of it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one for each token id, if asked for
    finish_reason: FinishReason | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None  # with the end
    attestation: Attestation | None = None  # with the end

    def add(self, later: "News") -> None:
        """Take in what came after it."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.error = later.finish_reason, later.error
        self.metrics, self.attestation = later.metrics, later.attestation


class Stream:
    """One request as its reader sees it, on the event loop: `async for news in stream`.

    News that nobody has taken are merged, so that a slow reader holds at most the request's whole output.
    """

    def __init__(
        self, request_id: str, num_samples: int, num_prompt: int, arrival: float, abort: Callable[["Stream"], None]
    ) -> None:
        self.request_id = request_id
        self.num_samples = num_samples
        self.num_prompt = num_prompt
        self.arrival = arrival  # seconds on the service's clock
        self.tenant = self.session = self.strategy = ""
        self.num_tokens = 0  # generated so far, all samples
        self.metrics: RequestMetrics | None = None  # live, of the first sample, once it has begun
        self.attestation: Attestation | None = None  # likewise
        self._abort = abort
        self._news: dict[int, News] = {}
        self._since: float | None = None  # since when there is something unread
        self._wake = asyncio.Event()
        self._num_open = num_samples
        self._error: Exception | None = None
        self.aborted = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come (something may still be unread)."""
        return self._num_open == 0

    def put(self, news: News, now: float) -> None:
        """Add news of one sample at `now` seconds."""
        self.num_tokens += len(news.token_ids)
        if news.finish_reason is not None:
            self._num_open -= 1
        if news.index in self._news:
            self._news[news.index].add(news)
        else:
            self._news[news.index] = news
        self._since = now if self._since is None else self._since
        self._wake.set()

    def refuse(self, error: Exception) -> None:
        """The request was never begun: its reader gets the error."""
        self._error = error
        self._num_open = 0
        self._wake.set()

    def unread_for(self, now: float) -> float:
        """Seconds for which there has been something unread."""
        return 0.0 if self._since is None else now - self._since

    def abort(self) -> None:
        """End the request in any phase; its memory is free before the next step. Nothing happens if it has ended."""
        if not self.aborted and not self.ended:
            self.aborted = True
            self._abort(self)

    def wake(self, event: asyncio.Event) -> None:
        """Set this event, which a reader of several streams waits for, whenever there is something to `take`."""
        if self._wake.is_set():
            event.set()
        self._wake = event

    def take(self) -> list[News]:
        """What is unread, now; raises what the engine refused the request for."""
        if self._error is not None:
            raise self._error
        news, self._news, self._since = self._news, {}, None
        return list(news.values())

    async def __aiter__(self) -> AsyncIterator[News]:
        """News as they come, until all samples have ended; raises what the engine refused the request for."""
        while not self.ended or self._news:
            await self._wake.wait()
            self._wake.clear()
            for one in self.take():
                yield one
        self.take()

    async def begun(self) -> None:
        """Wait until there is something to read; raises what the engine refused the request for."""
        await self._wake.wait()
        if self._error is not None:
            raise self._error

    async def whole(self) -> list[News]:
        """Wait for the end: all of every sample, in order."""
        samples: dict[int, News] = {}
        async for news in self:
            if news.index in samples:
                samples[news.index].add(news)
            else:
                samples[news.index] = news
        return [samples[index] for index in sorted(samples)]
