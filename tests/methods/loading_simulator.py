"""Requests that load and compute under a virtual clock: one link, one device, loading methods driven as an engine does.

The engine's side: before each step every request skips what has arrived, is asked whether it may compute, and gets
what the budget leaves, in whole blocks and never past the next arrived one. The I/O side: a worker for each request
asks for the next chunk as soon as the last has come; the link carries one transfer after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress
from kvwise.methods.loading.estimate import LinkEstimate, PrefillEstimate

BLOCK = 16


@dataclass(frozen=True)
class Link:
    """A transfer takes `latency_s` and its bytes over the speed, which `changes` (time, factor) may change under way.

    A dead link gives every transfer up after `deadline_s`.
    """

    bytes_per_second: float
    latency_s: float = 0.0
    changes: tuple[tuple[float, float], ...] = ()
    dead: bool = False
    deadline_s: float = 1.0

    def end(self, begin: float, num_bytes: float) -> float:
        if self.dead:
            return begin + self.deadline_s
        now, left = begin + self.latency_s, float(num_bytes)
        times = [0.0, *(at for at, _ in self.changes), float("inf")]
        speeds = [self.bytes_per_second, *(self.bytes_per_second * factor for _, factor in self.changes)]
        for speed, until in zip(speeds, times[1:], strict=True):
            if now < until:
                if now + left / speed <= until:
                    return now + left / speed
                left -= (until - now) * speed
                now = until
        raise AssertionError


@dataclass(frozen=True)
class Device:
    """A step of n tokens after c others takes (alpha * n + beta * n * c) / share seconds."""

    alpha: float
    beta: float
    share: float = 1.0
    step_tokens: int = 512

    def step_s(self, num_tokens: int, context: int) -> float:
        return num_tokens * (self.alpha + self.beta * context) / self.share

    def seconds(self, start: int, stop: int) -> float:
        steps = range(start, stop, self.step_tokens)
        return sum(self.step_s(min(self.step_tokens, stop - at), at) for at in steps)


@dataclass(frozen=True)
class Guess:
    """What requests are told of link and device: the truth times a factor, or nothing (None)."""

    compute: float | None = 1.0
    load: float | None = 1.0


@dataclass
class Learnt:
    """What requests are told: the estimators, fed with all that happens."""

    prefill: PrefillEstimate = field(default_factory=PrefillEstimate)
    link: LinkEstimate = field(default_factory=LinkEstimate)


@dataclass
class Request:
    """One request with blocks [first, stop) stored; blocks in `broken` cannot be read."""

    method: Loading
    stop: int
    first: int = 0
    num_tokens: int = 0
    block_bytes: int = 1000
    broken: frozenset[int] = frozenset()
    # -- what becomes of it
    decision: Decision | None = None
    prefix_s: float | None = None  # until the stored prefix was there
    ttft_s: float | None = None
    num_loads: list[int] = field(default_factory=list)  # by block
    num_computes: list[int] = field(default_factory=list)
    num_chunks: int = 0
    longest_step_s: float = 0.0
    longest_chunk_s: float = 0.0
    # -- on the way
    position: int = 0
    claimed: int = 0
    under_way: Chunk | None = None
    begun: float = 0.0
    due: float = float("inf")
    loading: bool = False
    last: tuple[int, float] = (0, 0.0)
    last_step: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_tokens or self.stop * BLOCK + 1
        self.position = self.first * BLOCK
        self.claimed = self.first
        self.arrived = np.zeros(self.stop - self.first, np.bool_)
        self.failed = self.arrived.copy()
        self.num_loads = [0] * (self.stop - self.first)
        self.num_computes = [0] * (self.stop - self.first)

    def progress(self, now: float) -> Progress:
        return Progress(
            computed=self.claimed,
            arrived=self.arrived.copy(),
            failed=self.failed.copy(),
            elapsed_s=now,
            last_bytes=self.last[0],
            last_s=self.last[1],
            last_tokens=self.last_step[0],
            last_step_s=self.last_step[1],
            under_way=self.under_way,
            waited_s=now - self.begun if self.under_way else 0.0,
            loading=self.loading,
        )


class Simulation:
    """Runs requests, all admitted at time 0, until each has its first token."""

    def __init__(self, device: Device, link: Link, requests: Sequence[Request], told: Guess | Learnt) -> None:
        self.device = device
        self.link = link
        self.requests = list(requests)
        self.told = told
        self.now = 0.0
        self.link_free_at = 0.0
        self.outlooks = {id(r): self._outlook(r) for r in self.requests}

    def run(self) -> list[Request]:
        for request in self.requests:
            request.decision = request.method.decide(self.outlooks[id(request)])
            request.loading = request.decision is not Decision.COMPUTE
            if request.loading:
                self._next_chunk(request, 0.0)
        for _ in range(100_000):
            if all(r.ttft_s is not None for r in self.requests):
                return self.requests
            self._step()
        raise AssertionError("it does not end")

    # -- the device's side --------------------------------------------------------------------------------------

    def _step(self) -> None:
        budget, seconds, computing = self.device.step_tokens, 0.0, []
        for request in self.requests:
            self._skip(request)
            if request.ttft_s is not None or budget < BLOCK:
                continue
            if request.loading and not request.method.may_compute(self.outlooks[id(request)], self._progress(request)):
                continue
            tokens = self._claim(request, budget)
            budget -= tokens
            seconds += self.device.step_s(tokens, request.position)
            computing.append((request, tokens))
        if not computing:
            self._wait()
            return
        self._carry_on_io(self.now + seconds)
        for request, tokens in computing:
            request.last_step = (tokens, seconds)
            request.longest_step_s = max(request.longest_step_s, seconds)
            if isinstance(self.told, Learnt):
                self.told.prefill.observe(tokens, request.position, seconds)
            request.position += tokens
            self._skip(request)

    def _skip(self, request: Request) -> None:
        if request.ttft_s is not None:
            return
        while (block := request.position // BLOCK) < request.stop and request.arrived[block - request.first]:
            request.position += BLOCK
        request.claimed = max(request.claimed, block)
        if request.prefix_s is None and request.position >= request.stop * BLOCK:
            request.prefix_s = self.now
        if request.position >= request.num_tokens:
            request.ttft_s = self.now

    def _claim(self, request: Request, budget: int) -> int:
        block = request.position // BLOCK
        if block >= request.stop:
            return min(budget, request.num_tokens - request.position)
        stop = min(block + budget // BLOCK, request.stop)
        ahead = np.flatnonzero(request.arrived[block - request.first : stop - request.first])
        stop = block + int(ahead[0]) if len(ahead) else stop
        for index in range(block, stop):
            request.num_computes[index - request.first] += 1
        request.claimed = stop
        return (stop - block) * BLOCK

    def _wait(self) -> None:
        due = min(r.due for r in self.requests)
        assert due < float("inf"), "nobody computes and nothing is on its way"
        self._carry_on_io(due)

    # -- the I/O side -------------------------------------------------------------------------------------------

    def _carry_on_io(self, until: float) -> None:
        while (request := min(self.requests, key=lambda r: r.due)).due <= until:
            self.now = request.due
            self._arrive(request)
            if request.ttft_s is None:
                self._next_chunk(request, self.now)
        self.now = until

    def _next_chunk(self, request: Request, now: float) -> None:
        chunk = request.method.next_chunk(self.outlooks[id(request)], self._progress(request))
        request.under_way, request.begun, request.due = chunk, now, float("inf")
        if chunk is None:
            request.loading = False
            return
        assert request.first <= chunk.start < chunk.stop <= request.stop
        request.num_chunks += 1
        num_bytes = (chunk.stop - chunk.start) * request.block_bytes
        request.due = self.link_free_at = self.link.end(max(now, self.link_free_at), num_bytes)

    def _arrive(self, request: Request) -> None:
        chunk = request.under_way
        assert chunk is not None
        seconds = self.now - request.begun
        num_bytes = (chunk.stop - chunk.start) * request.block_bytes
        request.longest_chunk_s = max(request.longest_chunk_s, seconds)
        if isinstance(self.told, Learnt):
            self.told.link.observe(num_bytes, seconds)
        for block in range(chunk.start, chunk.stop):
            assert not request.arrived[block - request.first]
            if self.link.dead or block in request.broken:
                request.failed[block - request.first] = True
                continue
            request.num_loads[block - request.first] += 1
            request.arrived[block - request.first] = block >= request.claimed
        if not self.link.dead:
            request.last = (num_bytes, seconds)
        request.under_way, request.due = None, float("inf")

    # -- what is told -------------------------------------------------------------------------------------------

    def _progress(self, request: Request) -> Progress:
        return request.progress(self.now)

    def _outlook(self, request: Request) -> Outlook:
        compute, load = self._guesses()
        num_blocks = request.stop - request.first
        return Outlook(
            block_size=BLOCK,
            first=request.first,
            stop=request.stop,
            num_tokens=request.num_tokens,
            step_tokens=self.device.step_tokens,
            tiers=["disk"] * num_blocks,
            num_bytes=[request.block_bytes] * num_blocks,
            seconds_to_compute=compute,
            seconds_to_load=load,
            queued_s=lambda tier: max(0.0, self.link_free_at - self.now),
        )

    def _guesses(self) -> tuple[Callable[[int, int], float | None], Callable[[str, int], float | None]]:
        told = self.told
        if isinstance(told, Learnt):
            return told.prefill.seconds, lambda tier, num_bytes: told.link.seconds(num_bytes)

        def compute(start: int, stop: int) -> float | None:
            return None if told.compute is None else told.compute * self.device.seconds(start, stop)

        def load(tier: str, num_bytes: int) -> float | None:
            if told.load is None:
                return None
            return told.load * (self.link.latency_s + num_bytes / self.link.bytes_per_second)

        return compute, load


def simulate(device: Device, link: Link, request: Request, told: Guess | Learnt | None = None) -> Request:
    """One request alone."""
    return Simulation(device, link, [request], told or Guess()).run()[0]
