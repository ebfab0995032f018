"""Drives one engine in real time: sends what is due, steps, samples, and cuts the cell at its limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwise.core.clock import Clock
from kvwise.core.output import EngineStats, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.study.face import EngineFace
from kvwise.study.workloads import Job

MAX_CLOSING_STEPS = 100  # an engine that still owes outputs after so many steps behind an abort will never pay


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine's figures at `time` seconds from the cell's start."""

    time: float
    stats: EngineStats
    resident_bytes: int


@dataclass(slots=True)
class Drive:
    """What happened: outputs by job index, samples, and per-step memory. Times are seconds from the start."""

    start: float
    duration: float = 0.0
    sent: dict[int, float] = field(default_factory=dict)  # job -> arrival
    outputs: dict[int, RequestOutput] = field(default_factory=dict)  # job -> latest output
    cut: bool = False  # the time limit ended it
    samples: list[Sample] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    byte_seconds: dict[str, float] = field(default_factory=dict)
    block_tokens: int = 16
    first: EngineStats | None = None
    last: EngineStats | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How a cell is driven: the clock and what waits on it, the limits, and what is sampled how often."""

    clock: Clock
    sleep: Callable[[float], None]
    resident_bytes: Callable[[], int]
    limit_s: float = 10.0
    sample_every_s: float = 0.02
    concurrency: int | None = None
    block_tokens: int = 16
    open_loop: bool = True  # a request's arrival is its due time, also when it could only be sent later


def warm_up(engine: EngineFace, prompts: Sequence[np.ndarray], output_tokens: int = 2) -> None:
    """Run unrelated prompts to the end, so that first-use costs are paid before anything is measured."""
    for prompt in prompts:
        engine.add_request(prompt.tolist(), SamplingParams(max_tokens=output_tokens, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()


def drive(engine: EngineFace, jobs: Sequence[Job], pace: Pace) -> Drive:
    """Run `jobs` to the end or to the time limit, whichever comes first."""
    return _Driver(engine, jobs, pace).run()


class _Driver:
    def __init__(self, engine: EngineFace, jobs: Sequence[Job], pace: Pace) -> None:
        self._engine = engine
        self._jobs = jobs
        self._pace = pace
        self._waiting = list(range(len(jobs)))
        self._running: dict[str, int] = {}
        self._ended: dict[int, float] = {}
        self._last_seen = 0.0
        self._out = Drive(pace.clock.now(), block_tokens=pace.block_tokens)

    def run(self) -> Drive:
        out, clock = self._out, self._pace.clock
        out.first = self._engine.stats()
        self._sample(0.0)
        while self._waiting or self._running:
            now = clock.now() - out.start
            if now >= self._pace.limit_s:
                self._cut()
                break
            self._send_due(now)
            if self._running:
                self._step()
            else:
                self._pace.sleep(min(self._next_due(), self._pace.limit_s) - now)
        out.duration = clock.now() - out.start
        self._sample(out.duration)
        out.last = self._engine.stats()
        return out

    def _ready(self, index: int) -> float | None:
        """When job `index` may be sent, or None while the turn before it is not answered."""
        job = self._jobs[index]
        if job.after is None:
            return job.not_before
        ended = self._ended.get(job.after)
        return None if ended is None else max(job.not_before, ended + job.think_s)

    def _next_due(self) -> float:
        # Something is always due when nothing runs: the first turn of a session waits for nobody.
        return min(ready for i in self._waiting if (ready := self._ready(i)) is not None)

    def _send_due(self, now: float) -> None:
        room = len(self._jobs) if self._pace.concurrency is None else self._pace.concurrency - len(self._running)
        due = [(ready, i) for i in self._waiting if (ready := self._ready(i)) is not None and ready <= now]
        for ready, index in sorted(due)[: max(room, 0)]:
            self._waiting.remove(index)
            self._send(index, ready if self._pace.open_loop else now)

    def _send(self, index: int, arrival: float) -> None:
        job = self._jobs[index]
        forced = None if job.forced is None else job.forced.tolist()
        params = SamplingParams(max_tokens=job.output_tokens, ignore_eos=True, forced_tokens=forced)
        name = self._engine.add_request(
            self._prompt(job), params, request_id=f"job-{index}", arrival=self._out.start + arrival
        )
        self._running[name] = index
        self._out.sent[index] = arrival

    def _prompt(self, job: Job) -> list[int]:
        if job.tail is None or job.after is None:
            return [int(t) for t in job.prompt]
        before = self._out.outputs[job.after]
        return [*before.prompt_token_ids, *before.token_ids, *job.prompt[-job.tail :].tolist()]

    def _step(self) -> None:
        outputs = self._engine.step()
        now = self._pace.clock.now() - self._out.start
        self._note(outputs, now)
        self._sample(now)

    def _note(self, outputs: Sequence[RequestOutput], now: float) -> None:
        for output in outputs:
            index = self._running.get(output.request_id)
            if index is None:
                continue
            self._out.outputs[index] = output
            if output.finish_reason is not None:
                del self._running[output.request_id]
                self._ended[index] = now

    def _cut(self) -> None:
        """Abort what runs; requests never sent stay unsent."""
        self._out.cut = True
        for name in list(self._running):
            self._engine.abort(name)
        for _ in range(MAX_CLOSING_STEPS):
            if not self._engine.has_unfinished():
                break
            self._note(self._engine.step(), self._pace.clock.now() - self._out.start)
        self._waiting.clear()

    def _sample(self, now: float) -> None:
        """Peaks and means see every step, the curves one in `sample_every_s`."""
        out, stats = self._out, self._engine.stats()
        since = now - self._last_seen
        for tier, used in stats.kv_bytes.items():
            out.peak_bytes[tier] = max(used, out.peak_bytes.get(tier, 0))
            out.byte_seconds[tier] = out.byte_seconds.get(tier, 0.0) + used * since
        self._last_seen = now
        if not out.samples or now - out.samples[-1].time >= self._pace.sample_every_s:
            out.samples.append(Sample(now, stats, self._pace.resident_bytes()))
