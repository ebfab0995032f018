"""The async bridge: engines on a thread of their own, asked from an event loop."""

import asyncio
import contextlib
import functools
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import InvariantError, KvwiseError, RequestError, UsageError
from kvwise.core.output import EngineStats, FinishReason, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.engine.engine import Engine
from kvwise.engine.stream import News, Stream
from kvwise.methods.catalogue import parse
from kvwise.models.loaded import LoadedModel

_log = logging.getLogger(__name__)
_IDLE_S = 0.05  # an engine with nothing to do still expires what is due, this often
_SNAPSHOT_S = 0.1  # figures are at most so old
_T = TypeVar("_T")


class State(StrEnum):
    """How the service is. Only READY takes requests."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    SWITCHING = "switching"  # the strategy: running requests end first
    DRAINING = "draining"  # running requests end, then it is CLOSED
    STUCK = "stuck"  # there is work, and no step has ended for longer than the watchdog allows
    BROKEN = "broken"  # a promise of the cache does not hold
    CLOSED = "closed"


class Overloaded(KvwiseError):
    """There is no room in the queue: try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(KvwiseError):
    """The service takes no requests in its `state`; try again in `retry_after_s` seconds."""

    def __init__(self, state: State, retry_after_s: float) -> None:
        super().__init__(f"the server is {state}: try again in {retry_after_s:.0f} s")
        self.state = state
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What may wait: requests that no step has scheduled yet, and the tokens of their prompts."""

    max_waiting: int = 256
    max_waiting_tokens: int = 2_000_000
    slow_reader_s: float = 30.0  # a stream whose oldest news nobody has taken for so long is aborted
    watchdog_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to an engine; fields as of `Engine.add_request`. `strategy` None: the service's own."""

    prompt: Sequence[int]
    params: SamplingParams | Sequence[SamplingParams]
    request_id: str
    images: Sequence[Any] = ()
    tenant: str = ""
    session: str = ""
    scope: Scope = Scope.TENANT
    ttl: Ttl = NO_TTL
    cache_salt: str = ""
    num_shareable: int | None = None
    priority: int = 0
    strategy: str | None = None

    @property
    def num_samples(self) -> int:
        """Outputs to come."""
        return self.params.n if isinstance(self.params, SamplingParams) else len(self.params)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Figures of one engine, at most a tenth of a second old. Counters since its start."""

    strategy: str
    at: float  # seconds on the service's clock
    stats: EngineStats
    misses: Mapping[str, int]  # admitted requests by what stopped their run of hits
    num_evicted: int
    num_leaked: int  # blocks that are held though no request runs and no transfer is on its way


@dataclass(slots=True)
class _Queued:
    """How much has been queued, in requests and tokens. Each has one writer, so that no lock is needed."""

    num_requests: int = 0
    num_tokens: int = 0

    def add(self, num_tokens: int) -> None:
        self.num_requests += 1
        self.num_tokens += num_tokens


@dataclass(slots=True)
class _Lane:
    """One strategy's engine. The event loop owns `streams` and `sent`; the engine's thread owns the rest."""

    engine: Engine
    streams: dict[str, Stream] = field(default_factory=dict)
    sent: _Queued = field(default_factory=_Queued)
    begun: _Queued = field(default_factory=_Queued)
    waiting: tuple[int, int] = (0, 0)  # requests that the engine has not scheduled, and their tokens
    told: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # characters and logprobs, by sample

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Requests that no step has scheduled, and their tokens."""
        number, tokens = self.waiting
        sent, begun = self.sent, self.begun
        return number + sent.num_requests - begun.num_requests, tokens + sent.num_tokens - begun.num_tokens

    def news(self, output: RequestOutput) -> News:
        """What an output adds to those before it."""
        key = (output.request_id, output.index)
        chars, logprobs = self.told.pop(key, (0, 0))
        all_logprobs = output.logprobs or []
        if not output.finished:
            self.told[key] = len(output.text), len(all_logprobs)
        end = (output.metrics, output.attestation) if output.finished else (None, None)
        return News(
            output.index, output.text[chars:], output.new_token_ids, all_logprobs[logprobs:], output.finish_reason,
            output.error, *end,
        )  # fmt: skip


class EngineService:
    """Runs the engines of one model, one for each strategy that requests may choose, on one thread.

    The first of `strategies` is what a request gets that names none; each engine has an equal share of the KV memory.
    All methods but `call` functions run on the event loop; none waits for a step, except where it says so.
    """

    def __init__(
        self, loaded: LoadedModel, strategies: Sequence[Strategy], config: EngineConfig,
        limits: ServiceLimits = ServiceLimits(), clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.loaded = loaded
        self.config = config
        self.limits = limits
        self.clock = clock or MonotonicClock()
        self.state = State.STARTING
        self.listeners: list[Callable[[Sequence[RequestOutput]], None]] = []  # on the engine's thread, each step
        if len(strategies) > 1 and config.kv_cache_memory_bytes is None:
            raise UsageError("several strategies share the KV memory: say how much there is with kv_cache_memory_bytes")
        if config.kv_cache_memory_bytes is not None:
            config = replace(config, kv_cache_memory_bytes=config.kv_cache_memory_bytes // len(strategies))
        self._config = config  # of each engine
        self._lanes = {str(one): _Lane(Engine(loaded, one, config, self.clock)) for one in strategies}
        self._default = str(strategies[0])
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._snapshots: dict[str, EngineSnapshot] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None  # when the step that is running began
        self._rate = 0.0  # tokens a second, computed and generated, forgetting
        self._idle = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve; `ready` (or `begin_warming`) says when requests are welcome."""
        self._loop = asyncio.get_running_loop()
        for lane in self._lanes.values():
            self._note_figures(lane)
        self._thread = threading.Thread(target=self._run, name="kvwise-engine", daemon=True)
        self._thread.start()
        self._idle.set()

    def begin_warming(self) -> None:
        """Only warm-up requests are served until `ready`."""
        self.state = State.WARMING

    def ready(self) -> None:
        """Requests are welcome."""
        self.state = State.READY

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those there are; what is left after `timeout_s` is aborted: False."""
        self.state = State.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            for stream in self.streams():
                stream.abort()
            return False
        return True

    async def close(self) -> None:
        """End all requests and the thread, and free the engines."""
        self.state = State.CLOSED
        if self._thread is not None:
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        for lane in self._lanes.values():
            lane.engine.close()
        await asyncio.sleep(0)  # what the thread told last reaches its readers

    @property
    def health(self) -> State:
        """How it is now; answers also while the engine's thread hangs."""
        since = self._busy_since
        if since is not None and self.clock.now() - since > self.limits.watchdog_s:
            return State.STUCK
        return self.state

    # -- requests -----------------------------------------------------------------------------------------------

    @property
    def strategies(self) -> list[str]:
        """Those that a request may choose; the first is the default."""
        return [self._default, *(name for name in self._lanes if name != self._default)]

    def streams(self) -> list[Stream]:
        """Of all requests that have not ended."""
        return [stream for lane in self._lanes.values() for stream in list(lane.streams.values())]

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Requests that no step has scheduled yet, and the tokens of their prompts."""
        each = [lane.num_waiting for lane in self._lanes.values()]
        return sum(number for number, _ in each), sum(tokens for _, tokens in each)

    def require_room(self, num_tokens: int = 0) -> None:
        """Overloaded or Unavailable, within microseconds, if a request of `num_tokens` would be refused now."""
        if self.health is not State.READY:
            raise Unavailable(self.health, 1.0 if self.state is State.SWITCHING else 5.0)
        waiting, waiting_tokens = self.num_waiting
        limits = self.limits
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
        return min(60.0, max(0.5, num_tokens / 4 / self._rate)) if self._rate > 0 else 1.0

    def new_id(self, prefix: str) -> str:
        """A request id that nobody has."""
        return f"{prefix}-{next(self._ids)}"

    def submit(self, request: Generate) -> Stream:
        """Queue a request. Overloaded or Unavailable for lack of room, UsageError if it can never be served."""
        self.require_room(len(request.prompt))
        return self._submit(request)

    def submit_warm(self, request: Generate, *, pin: bool, pin_until: float | None = None) -> Stream:
        """Queue a prompt to be computed and kept (see `Engine.warm`), also while WARMING."""
        if self.health not in (State.READY, State.WARMING):
            raise Unavailable(self.health, 5.0)
        return self._submit(request, pin=pin, pin_until=pin_until, warm=True)

    def _submit(
        self, request: Generate, *, warm: bool = False, pin: bool = False, pin_until: float | None = None
    ) -> Stream:
        lane = self._lane(request.strategy)
        samples = [request.params] if isinstance(request.params, SamplingParams) else list(request.params)
        for one in samples:
            if not request.images:  # their tokens are not known yet
                lane.engine.require_servable(request.prompt, one)
        if any(request.request_id in known.streams for known in self._lanes.values()):
            raise UsageError(f"request id {request.request_id!r} is in use: choose another")
        stream = Stream(request.request_id, request.num_samples, len(request.prompt), self.clock.now(), self._abort)
        stream.tenant, stream.session, stream.strategy = request.tenant, request.session, str(lane.engine.strategy)
        lane.streams[request.request_id] = stream
        lane.sent.add(len(request.prompt))
        self._idle.clear()
        self._commands.put(lambda: self._begin(lane, request, stream, warm=warm, pin=pin, pin_until=pin_until))
        return stream

    def _lane(self, strategy: str | None) -> _Lane:
        name = self._default if strategy is None else str(parse(strategy))
        if name not in self._lanes:
            raise UsageError(f"strategy {name!r} is not served here; choose one of {', '.join(self.strategies)}")
        return self._lanes[name]

    def _abort(self, stream: Stream) -> None:
        self._commands.put(lambda: self._end(stream))

    async def call(self, work: Callable[[Engine], _T], strategy: str | None = None) -> _T:
        """Do something with an engine on its thread, between two steps; what it returns or raises."""
        lane = self._lane(strategy)
        done: Future[_T] = Future()
        self._commands.put(lambda: _fulfil(done, lambda: work(lane.engine)))
        return await asyncio.wrap_future(done)

    # -- switching ----------------------------------------------------------------------------------------------

    async def switch(self, strategy: Strategy, timeout_s: float) -> None:
        """Make `strategy` the default: running requests end first, new ones are told to come again.

        RequestError if they do not end within `timeout_s`, and nothing has changed then; what blocks the device held is
        gone, what lies in tiers stays. If the engine cannot be made, the old one is back.
        """
        if self.health is not State.READY:
            raise Unavailable(self.health, 5.0)
        name = str(strategy)
        if name in self._lanes:
            self._default = name
            return
        self.state = State.SWITCHING
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                raise RequestError(
                    f"{len(self.streams())} requests have not ended within {timeout_s:g} s: the strategy is what it was"
                ) from None
            done: Future[None] = Future()
            self._commands.put(lambda: _fulfil(done, lambda: self._replace(strategy)))
            await asyncio.wrap_future(done)
        finally:
            if self.state is State.SWITCHING:
                self.state = State.READY

    def _replace(self, strategy: Strategy) -> None:
        old = self._lanes[self._default].engine
        before = old.strategy
        old.close()
        try:
            engine, error = Engine(self.loaded, strategy, self._config, self.clock), None
        except Exception as failed:  # a method is somebody's code: it may raise anything
            engine, error = Engine(self.loaded, before, self._config, self.clock), failed
        self._snapshots.pop(self._default)
        lanes = {name: lane for name, lane in self._lanes.items() if name != self._default}
        self._default = str(engine.strategy)
        self._lanes = {self._default: _Lane(engine), **lanes}
        self._note_figures(self._lanes[self._default])
        if error is not None:
            raise error

    # -- figures ------------------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> list[EngineSnapshot]:
        """Figures of all engines, the default's first."""
        return [self._snapshots[name] for name in self.strategies]

    def _note_figures(self, lane: _Lane) -> None:
        engine, cache = lane.engine, lane.engine.memory.cache
        usage, stats = cache.usage(), engine.stats()
        resting = not engine.has_unfinished() and not usage.num_held
        self._snapshots[str(engine.strategy)] = EngineSnapshot(
            str(engine.strategy),
            self.clock.now(),
            stats,
            {str(reason): count for reason, count in cache.miss_counts.items()},
            cache.num_evicted,
            usage.num_referenced + usage.num_broken if resting else 0,
        )

    # -- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Commands, then a step of each engine that has work, until told to end."""
        while self._obey():
            for lane in list(self._lanes.values()):
                if lane.engine.has_unfinished():
                    self._step(lane)
        for lane in self._lanes.values():
            lane.engine.abort_all()
            self._tell(lane, lane.engine.collect())

    def _obey(self) -> bool:
        """Carry out the commands there are; with nothing to do, wait for one. False: it is over."""
        busy = any(lane.engine.has_unfinished() for lane in self._lanes.values())
        while True:
            try:
                command = self._commands.get(block=not busy, timeout=None if busy else _IDLE_S)
            except queue.Empty:
                if not busy:
                    self._rest()
                return True
            if command is None:
                return False
            command()
            busy = True

    def _rest(self) -> None:
        """What engines without requests have to do."""
        for lane in self._lanes.values():
            lane.engine.idle()
            self._note_figures(lane)

    def _step(self, lane: _Lane) -> None:
        began = self.clock.now()
        self._busy_since = began
        try:
            outputs = lane.engine.step()
        except Exception as error:  # no request may take the others, or the thread, with it
            _log.exception("a step failed")
            if isinstance(error, InvariantError):
                self.state = State.BROKEN
            outputs = self._fail(lane, error)
        now = self.clock.now()
        self._busy_since = None
        self._tell(lane, outputs)
        self._note_rate(lane.engine.num_step_tokens, now - began)
        if now - self._snapshots[str(lane.engine.strategy)].at >= _SNAPSHOT_S:
            self._note_figures(lane)

    def _note_rate(self, num_tokens: int, seconds: float) -> None:
        """The speed seen lately: an average over about ten seconds."""
        if num_tokens and seconds > 0:
            share = min(1.0, seconds / 10 if self._rate else 1.0)
            self._rate += share * (num_tokens / seconds - self._rate)

    def _fail(self, lane: _Lane, error: Exception) -> list[RequestOutput]:
        """Every request of an engine whose step raised has failed."""
        lane.engine.abort_all()
        reason = f"{type(error).__name__}: {error}"
        return [replace(o, finish_reason=FinishReason.ERROR, error=o.error or reason) for o in lane.engine.collect()]

    def _begin(
        self, lane: _Lane, request: Generate, stream: Stream, *, warm: bool, pin: bool, pin_until: float | None
    ) -> None:
        try:
            lane.engine.add_request(
                request.prompt, request.params, images=request.images, request_id=request.request_id,
                salt=request.tenant, session=request.session, scope=request.scope, ttl=request.ttl,
                cache_salt=request.cache_salt, num_shareable=request.num_shareable, priority=request.priority,
                arrival=stream.arrival,
            )  # fmt: skip
            if warm:
                lane.engine.hold_warm(request.request_id, pin=pin, pin_until=pin_until)
        except Exception as error:  # images, sessions: what only the engine can refuse
            self._on_loop(functools.partial(self._refused, lane, stream, error))
        lane.begun.add(len(request.prompt))
        lane.waiting = lane.engine.num_waiting

    def _end(self, stream: Stream) -> None:
        """Abort a request: its memory is free before the next step."""
        for lane in self._lanes.values():
            lane.engine.abort(stream.request_id)
            self._tell(lane, lane.engine.collect())

    def _tell(self, lane: _Lane, outputs: Sequence[RequestOutput]) -> None:
        """Hand news over to the event loop, all of a step at once."""
        lane.waiting = lane.engine.num_waiting
        if not outputs:
            return
        for listener in self.listeners:
            listener(outputs)
        news = [(output, lane.news(output)) for output in outputs]
        self._on_loop(lambda: self._deliver(lane, news))

    def _on_loop(self, work: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has been closed under us: nobody is left to be told
            self._loop.call_soon_threadsafe(work)

    # -- on the event loop again --------------------------------------------------------------------------------

    def _deliver(self, lane: _Lane, news: Sequence[tuple[RequestOutput, News]]) -> None:
        """Put news into their streams, and abort those that nobody reads."""
        now = self.clock.now()
        for output, one in news:
            stream = lane.streams.get(output.request_id)
            if stream is None:
                continue
            if output.index == 0:
                stream.metrics, stream.attestation = output.metrics, output.attestation
            stream.put(one, now)
            if stream.ended:
                self._forget(lane, stream)
            elif stream.unread_for(now) > self.limits.slow_reader_s:
                _log.warning("request %s is aborted: nobody has read it for %g s", stream.request_id,
                             self.limits.slow_reader_s)  # fmt: skip
                stream.abort()

    def _refused(self, lane: _Lane, stream: Stream, error: Exception) -> None:
        stream.refuse(error)
        self._forget(lane, stream)

    def _forget(self, lane: _Lane, stream: Stream) -> None:
        lane.streams.pop(stream.request_id, None)
        if not any(other.streams for other in self._lanes.values()):
            self._idle.set()


def _fulfil(done: "Future[_T]", work: Callable[[], _T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
