"""The engine's thread: commands from the event loop, steps, and news back to it."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kvwise.core.clock import Clock
from kvwise.core.errors import InvariantError, KvwiseError
from kvwise.core.output import FinishReason, RequestOutput
from kvwise.engine.engine import Engine
from kvwise.engine.serving import EngineSnapshot, Generate, Moved
from kvwise.engine.stream import News

_log = logging.getLogger(__name__)
_IDLE_S = 0.05  # an engine with nothing to do still expires what is due, this often
_SNAPSHOT_S = 0.1  # figures are at most so old
_RATE_S = 10.0  # over which the speed is averaged
T = TypeVar("T")
Told = Callable[[Sequence[tuple[RequestOutput, News]], float], None]


@dataclass(slots=True)
class Count:
    """Requests and their prompts' tokens since the start. Each has one writer, so that no lock is needed."""

    requests: int = 0
    tokens: int = 0

    def add(self, num_tokens: int) -> None:
        """One more request."""
        self.requests += 1
        self.tokens += num_tokens


@dataclass(eq=False, slots=True)
class Lane:
    """One strategy's engine, and what is on its way to it. `sent` is the event loop's, the rest the thread's."""

    name: str
    engine: Engine
    sent: Count = field(default_factory=Count)
    begun: Count = field(default_factory=Count)
    queued: tuple[int, int] = (0, 0)  # requests that the engine has not scheduled, and their tokens
    _told: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # characters and logprobs, by sample

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Requests that no step has scheduled, and their tokens. Safe on any thread."""
        number, tokens = self.queued
        return number + self.sent.requests - self.begun.requests, tokens + self.sent.tokens - self.begun.tokens

    def news(self, output: RequestOutput) -> News:
        """What an output adds to those before it."""
        key = (output.request_id, output.index)
        chars, logprobs = self._told.pop(key, (0, 0))
        every = output.logprobs or []
        if not output.finished:
            self._told[key] = len(output.text), len(every)
        news = News(output.index, output.text[chars:], output.new_token_ids, every[logprobs:])
        news.finish_reason, news.error = output.finish_reason, output.error
        if output.finished:
            news.metrics, news.attestation = output.metrics, output.attestation
        return news


class EngineThread:
    """Steps the engines of all lanes. What it does is asked for by `put`, and happens between two steps.

    `tell` gets each step's outputs, what they add, and the seconds that the step took. The next one waits for it.
    """

    def __init__(self, lanes: Mapping[str, Lane], clock: Clock, tell: Told) -> None:
        self.lanes = dict(lanes)
        self.snapshots: dict[str, EngineSnapshot] = {}
        self.retired: list[EngineSnapshot] = []  # the last figures of engines that were replaced, oldest first
        self.busy_since: float | None = None  # when the step that is running began
        self.is_broken = False  # a promise of some cache does not hold
        self.rate = 0.0  # tokens a second that the engines compute, lately
        self._clock = clock
        self._tell = tell
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvwise-engine", daemon=True)
        self.note_figures()

    # -- on any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def put(self, command: Callable[[], None]) -> None:
        """Have something done; it must not raise."""
        self._commands.put(command)

    def ask(self, work: Callable[[], T]) -> "Future[T]":
        """Have something done, and get what it returns or raises."""
        done: Future[T] = Future()
        self.put(lambda: _fulfil(done, work))
        return done

    def end(self) -> None:
        """Abort all requests and end; waits for the step that is running."""
        if self._thread.is_alive():
            self._commands.put(None)
            self._thread.join()

    # -- commands -----------------------------------------------------------------------------------------------

    def begin(
        self, lane: Lane, request: Generate, arrival: float, pin: tuple[bool, float | None] | None
    ) -> Exception | None:
        """Queue a request, one to keep warm if `pin` says how; the error if the engine refuses it."""
        refused = None
        try:
            lane.engine.add_request(
                request.prompt, request.params, images=request.images, request_id=request.request_id,
                salt=request.tenant, session=request.session, scope=request.scope, ttl=request.ttl,
                cache_salt=request.cache_salt, num_shareable=request.num_shareable, priority=request.priority,
                arrival=arrival,
            )  # fmt: skip
            if pin is not None:
                lane.engine.hold_warm(request.request_id, pin=pin[0], pin_until=pin[1])
        except Exception as error:  # images may be anything
            refused = error
            if not isinstance(error, KvwiseError):
                lane.engine.abort(request.request_id)  # it may have been queued before that
        lane.queued = lane.engine.num_waiting
        lane.begun.add(len(request.prompt))
        return refused

    def abort(self, lane: Lane, request_id: str) -> None:
        """End a request: its memory is free before the next step."""
        lane.engine.abort(request_id)
        self._hand_over(lane, lane.engine.collect())

    def note_figures(self) -> None:
        """Make the snapshots new."""
        for lane in self.lanes.values():
            self._note_figures(lane)

    def replace(self, lane: Lane, make: Callable[[], Engine]) -> Lane:
        """Another engine in the place of one without requests: its lane."""
        self._note_figures(lane)
        last = self.snapshots[lane.name]
        lane.engine.close()
        engine = make()
        fresh = Lane(str(engine.strategy), engine)
        self.retired.append(last)
        self._note_figures(fresh)
        self.lanes = {fresh.name: fresh, **{name: one for name, one in self.lanes.items() if one is not lane}}
        return fresh

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Commands, then a step of each engine that has work, until told to end."""
        while self._obey():
            for lane in list(self.lanes.values()):
                if lane.engine.has_unfinished():
                    self._step(lane)
        for lane in self.lanes.values():
            lane.engine.abort_all()
            self._hand_over(lane, lane.engine.collect())

    def _obey(self) -> bool:
        """Carry out the commands there are; with nothing to do, wait for one. False: it is over."""
        busy = any(lane.engine.has_unfinished() for lane in self.lanes.values())
        while True:
            try:
                command = self._commands.get(block=not busy, timeout=None if busy else _IDLE_S)
            except queue.Empty:
                if not busy:
                    self._rest()
                return True
            if command is None:
                return False
            try:
                command()
            except Exception:  # the thread outlives it; whoever waits for an answer has got the error
                _log.exception("a command to the engine failed")
                self.is_broken = True
            busy = True

    def _rest(self) -> None:
        """What engines without requests have to do."""
        for lane in self.lanes.values():
            lane.engine.idle()
        self.note_figures()

    def _step(self, lane: Lane) -> None:
        began = self.busy_since = self._clock.now()
        try:
            outputs = lane.engine.step()
        except Exception as error:  # no request may take the others, or the thread, with it
            _log.exception("a step failed: all requests of %s have", lane.name)
            self.is_broken |= isinstance(error, InvariantError)
            outputs = self._fail(lane, error)
        now = self._clock.now()
        self.busy_since = None
        self._hand_over(lane, outputs, now - began)
        self._note_rate(lane.engine.num_step_tokens, now - began)
        if now - self.snapshots[lane.name].at >= _SNAPSHOT_S:
            self._note_figures(lane)

    def _fail(self, lane: Lane, error: Exception) -> list[RequestOutput]:
        """Every request of an engine whose step raised has failed."""
        lane.engine.abort_all()
        reason = f"{type(error).__name__}: {error}"
        return [replace(o, finish_reason=FinishReason.ERROR, error=o.error or reason) for o in lane.engine.collect()]

    def _hand_over(self, lane: Lane, outputs: Sequence[RequestOutput], took_s: float = 0.0) -> None:
        lane.queued = lane.engine.num_waiting
        if outputs:
            self._tell([(output, lane.news(output)) for output in outputs], took_s)

    def _note_rate(self, num_tokens: int, seconds: float) -> None:
        if num_tokens and seconds > 0:
            share = min(1.0, seconds / _RATE_S) if self.rate else 1.0
            self.rate += share * (num_tokens / seconds - self.rate)

    def _note_figures(self, lane: Lane) -> None:
        engine, cache = lane.engine, lane.engine.memory.cache
        usage, hierarchy = cache.usage(), engine.memory.hierarchy
        below = () if hierarchy is None else hierarchy.tiers
        resting = not engine.has_unfinished() and not usage.num_held
        self.snapshots[lane.name] = EngineSnapshot(
            lane.name,
            self._clock.now(),
            engine.stats(),
            {str(reason): count for reason, count in cache.miss_counts.items()},
            cache.num_evicted,
            usage.num_referenced + usage.num_broken if resting else 0,
            cache.block_ages(),
            {tier.name: Moved(tier.read_pace.num_bytes, tier.write_pace.num_bytes) for tier in below},
        )


def _fulfil(done: "Future[T]", work: Callable[[], T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
