"""The async bridge: engines on a thread of their own, asked from an event loop."""

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import RequestError, UsageError
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.engine.engine import Engine
from kvwise.engine.serving import EngineSnapshot, Generate, Overloaded, ServiceLimits, State, Unavailable
from kvwise.engine.stream import News, Stream
from kvwise.engine.worker import EngineThread, Lane
from kvwise.methods.catalogue import parse
from kvwise.models.loaded import LoadedModel

__all__ = ["EngineService", "EngineSnapshot", "Generate", "Overloaded", "ServiceLimits", "State", "Unavailable"]

_log = logging.getLogger(__name__)
_SOON_S, _LATER_S = 1.0, 5.0  # when to come again: after a switch of strategy, after anything else
_STEP_SHARE, _MOMENT_S = 0.02, 0.002  # a first token's way out may hold up the next step: of the last one, at most
_T = TypeVar("_T")


class EngineService:
    """Runs the engines of one model, one for each strategy that requests may choose, on one thread.

    The first of `strategies` is what a request gets that names none; each engine has an equal share of the KV memory.
    All methods run on one event loop, and none waits for a step unless it is a coroutine.
    """

    def __init__(
        self, loaded: LoadedModel, strategies: Sequence[Strategy], config: EngineConfig,
        limits: ServiceLimits = ServiceLimits(), clock: Clock | None = None,  # noqa: B008
    ) -> None:  # fmt: skip
        self.loaded = loaded
        self.limits = limits
        self.clock = clock or MonotonicClock()
        self.config = _share(config, len(strategies))  # of each engine
        self._state = State.STARTING
        self._default = str(strategies[0])
        lanes = [Lane(str(one), Engine(loaded, one, self.config, self.clock)) for one in strategies]
        self._thread = EngineThread({lane.name: lane for lane in lanes}, self.clock, self._on_news)
        self._streams: dict[str, tuple[Lane, Stream]] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to step; `ready` says when requests are welcome."""
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread.start()

    def begin_warming(self) -> None:
        """Only warm-up requests are served until `ready`."""
        self._state = State.WARMING

    def ready(self) -> None:
        """Requests are welcome."""
        self._state = State.READY

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those there are; what is left after `timeout_s` is aborted: False."""
        self._state = State.DRAINING
        if await self._rests_within(timeout_s):
            return True
        for stream in self.streams():
            stream.abort()
        return False

    async def _rests_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End all requests and the thread, and free the engines."""
        self._state = State.CLOSED
        await asyncio.to_thread(self._thread.end)
        for lane in self._thread.lanes.values():
            lane.engine.close()
        await asyncio.sleep(0)  # what the thread told last reaches its readers

    @property
    def health(self) -> State:
        """How it is now; answers also while a step hangs."""
        since = self._thread.busy_since
        if since is not None and self.clock.now() - since > self.limits.watchdog_s:
            return State.STUCK
        return State.BROKEN if self._thread.is_broken else self._state

    # -- requests -----------------------------------------------------------------------------------------------

    @property
    def strategies(self) -> list[str]:
        """Those that a request may choose; the first is the default."""
        return [self._default, *(name for name in self._thread.lanes if name != self._default)]

    def streams(self) -> list[Stream]:
        """Of all requests that have not ended."""
        return [stream for _, stream in self._streams.values()]

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Requests that no step has scheduled yet, and the tokens of their prompts."""
        each = [lane.num_waiting for lane in self._thread.lanes.values()]
        return sum(number for number, _ in each), sum(tokens for _, tokens in each)

    def max_request_tokens(self, strategy: str | None = None) -> int:
        """Tokens that a request may come to, prompt and output, under a strategy (None: the default)."""
        return self._lane(strategy).engine.max_request_tokens

    def require_room(self, num_tokens: int = 0) -> None:
        """Overloaded or Unavailable, within microseconds, if a request of `num_tokens` would be refused now."""
        if (state := self.health) is not State.READY:
            raise Unavailable(state, _SOON_S if state is State.SWITCHING else _LATER_S)
        (waiting, waiting_tokens), limits = self.num_waiting, self.limits
        if waiting >= limits.max_waiting:
            raise Overloaded(f"{waiting} requests are waiting, and no more may", self._retry_after(waiting_tokens))
        if waiting and waiting_tokens + num_tokens > limits.max_waiting_tokens:
            raise Overloaded(
                f"prompts of {waiting_tokens} tokens are waiting, {limits.max_waiting_tokens} may: no room for "
                f"{num_tokens}",
                self._retry_after(waiting_tokens),
            )

    def _retry_after(self, num_tokens: int) -> float:
        """Seconds until a quarter of the queue should have been served at the speed seen; 0.5 to 60."""
        rate = self._thread.rate
        return min(60.0, max(0.5, num_tokens / 4 / rate)) if rate else _SOON_S

    def new_id(self, prefix: str) -> str:
        """A request id that nobody has."""
        return f"{prefix}-{next(self._ids)}"

    def submit(self, request: Generate) -> Stream:
        """Queue a request. Overloaded or Unavailable for lack of room, UsageError if it can never be served."""
        self.require_room(len(request.prompt))
        return self._submit(request, None)

    def submit_warm(self, request: Generate, *, pin: bool, pin_until: float | None = None) -> Stream:
        """Queue a prompt to be computed and kept (see `Engine.warm`), also while WARMING."""
        if self.health not in (State.READY, State.WARMING):
            raise Unavailable(self.health, _LATER_S)
        return self._submit(request, (pin, pin_until))

    def _submit(self, request: Generate, pin: tuple[bool, float | None] | None) -> Stream:
        lane = self._lane(request.strategy)
        samples = [request.params] if isinstance(request.params, SamplingParams) else request.params
        for one in [] if request.images else samples:  # of images the tokens are not known yet
            lane.engine.require_servable(request.prompt, one)
        if request.request_id in self._streams:
            raise UsageError(f"request id {request.request_id!r} is in use: choose another")
        stream = Stream(request.request_id, request.num_samples, len(request.prompt), self.clock.now(), self._abort)
        stream.tenant, stream.session, stream.strategy = request.tenant, request.session, lane.name
        self._streams[request.request_id] = lane, stream
        lane.sent.add(len(request.prompt))
        self._idle.clear()
        self._thread.put(lambda: self._begin(lane, request, stream, pin))
        return stream

    def _begin(self, lane: Lane, request: Generate, stream: Stream, pin: tuple[bool, float | None] | None) -> None:
        error = self._thread.begin(lane, request, stream.arrival, pin)
        if error is not None:
            self._on_loop(functools.partial(self._refuse, stream, error))

    def _refuse(self, stream: Stream, error: Exception) -> None:
        stream.refuse(error)
        self._forget(stream)

    def _lane(self, strategy: str | None) -> Lane:
        name = self._default if strategy is None else str(parse(strategy))
        if name not in self._thread.lanes:
            raise UsageError(f"strategy {name!r} is not served here; choose one of {', '.join(self.strategies)}")
        return self._thread.lanes[name]

    def _abort(self, stream: Stream) -> None:
        if stream.request_id in self._streams:
            lane, _ = self._streams[stream.request_id]
            self._thread.put(lambda: self._thread.abort(lane, stream.request_id))

    async def call(self, work: Callable[[Engine], _T], strategy: str | None = None) -> _T:
        """Do something with an engine on its thread, between two steps; what it returns or raises."""
        engine = self._lane(strategy).engine
        return await asyncio.wrap_future(self._thread.ask(lambda: work(engine)))

    # -- news ---------------------------------------------------------------------------------------------------

    def _on_news(self, news: Sequence[tuple[RequestOutput, News]], took_s: float) -> None:
        """On the engine's thread, after a step of `took_s` seconds.

        Both threads need the interpreter's lock, and in turns a first token takes twice as long to its reader. So the
        next step lets it go first, for as long as the engine will not feel.
        """
        first_told = threading.Event()
        self._on_loop(lambda: self._deliver(news, first_told))
        if any(_is_first(output) for output, _ in news):
            first_told.wait(min(_STEP_SHARE * took_s, _MOMENT_S))

    def _on_loop(self, work: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed under us: nobody is left to be told
            self._loop.call_soon_threadsafe(work)

    def _deliver(self, news: Sequence[tuple[RequestOutput, News]], first_told: threading.Event) -> None:
        """Put a step's news into their streams. `first_told` is set when readers of first tokens have had their turn.

        The loop runs them in the order in which they are woken: those who wait for a first token come first.
        """
        now = self.clock.now()
        for output, one in news:
            if _is_first(output):
                self._put(output, one, now)
        asyncio.get_running_loop().call_soon(first_told.set)
        for output, one in news:
            if not _is_first(output):
                self._put(output, one, now)

    def _put(self, output: RequestOutput, news: News, now: float) -> None:
        """Put news into its stream, and abort what nobody reads."""
        if output.request_id not in self._streams:
            return
        _, stream = self._streams[output.request_id]
        if output.index == 0:
            stream.metrics, stream.attestation = output.metrics, output.attestation
        stream.put(news, now)
        if stream.ended:
            self._forget(stream)
        elif stream.unread_for(now) > self.limits.slow_reader_s and not stream.aborted:
            _log.warning("request %s is aborted: nobody reads it", stream.request_id)
            stream.abort()

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.request_id, None)
        if not self._streams:
            self._idle.set()

    # -- switching ----------------------------------------------------------------------------------------------

    async def switch(self, strategy: Strategy, timeout_s: float) -> None:
        """Make `strategy` the default: running requests end first, new ones are told to come again.

        RequestError if they do not end within `timeout_s`, and nothing has changed then. What the device held is gone,
        what lies in tiers stays. If the new engine cannot be made, the old one is back, and the error is raised.
        """
        if self.health is not State.READY:
            raise Unavailable(self.health, _LATER_S)
        if str(strategy) in self._thread.lanes:
            self._default = str(strategy)
            return
        self._state = State.SWITCHING
        try:
            if not await self._rests_within(timeout_s):
                raise RequestError(
                    f"{len(self._streams)} requests have not ended within {timeout_s:g} s: the strategy is what it was"
                )
            await asyncio.wrap_future(self._thread.ask(lambda: self._replace(strategy)))
        finally:
            if self._state is State.SWITCHING:
                self._state = State.READY

    def _replace(self, strategy: Strategy) -> None:
        lane = self._lane(None)
        before, failed = lane.engine.strategy, None

        def make() -> Engine:
            nonlocal failed
            try:
                return Engine(self.loaded, strategy, self.config, self.clock)
            except Exception as error:  # a method is somebody's code: it may raise anything
                failed = error
                return Engine(self.loaded, before, self.config, self.clock)

        self._default = self._thread.replace(lane, make).name
        if failed is not None:
            raise failed

    # -- figures ------------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> list[EngineSnapshot]:
        """Figures of all engines, the default's first, at most a tenth of a second old."""
        return [self._thread.snapshots[name] for name in self.strategies]

    async def refresh(self, timeout_s: float) -> None:
        """Make `snapshots` new, which a step that is running can hold up; for at most `timeout_s`."""
        await asyncio.wait([asyncio.wrap_future(self._thread.ask(self._thread.note_figures))], timeout=timeout_s)

    @property
    def retired(self) -> list[EngineSnapshot]:
        """The last figures of engines that a switch has replaced, oldest first."""
        return list(self._thread.retired)


def _is_first(output: RequestOutput) -> bool:
    """Whether it has the first tokens of its sample."""
    return bool(output.new_token_ids) and len(output.new_token_ids) == len(output.token_ids)


def _share(config: EngineConfig, count: int) -> EngineConfig:
    if count == 1:
        return config
    if config.kv_cache_memory_bytes is None:
        raise UsageError("several strategies share the KV memory: say how much there is with kv_cache_memory_bytes")
    return replace(config, kv_cache_memory_bytes=config.kv_cache_memory_bytes // count)
