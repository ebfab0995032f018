"""What the live view tells of the last minutes: times to tokens, throughput, and the requests that have ended."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import numpy as np

from kvwise.core.clock import Clock
from kvwise.server.record import RequestRecord

BIN_S, NUM_BINS = 2.0, 150  # five minutes
_LATELY = 30  # bins whose requests make the percentiles of now: a minute
_SPEED = 5  # whole bins over which speeds are averaged
_DECADES, _PER_DECADE, _LEAST_S = 7, 24, 1e-5  # a bucket is a tenth wide, in a logarithmic sense
_BUCKETS = _DECADES * _PER_DECADE
_NUM_ENDED = 24  # requests that are remembered
_NUM_OPEN = 8192  # requests whose pace is watched at once
OUTPUT, PROMPT, CACHED, ENDED, REFUSED = range(5)
_TTFT, _TPOT = range(2)


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, and whose it was. Attestations and times are of its first sample."""

    number: int  # since the start, so that a viewer knows what is new
    record: RequestRecord
    tenant_id: str


class Bins:
    """Counts in bins of two seconds, as long as they matter. Costs the same however many requests there are."""

    def __init__(self, now: float) -> None:
        self._times = np.zeros((2, NUM_BINS, _BUCKETS), np.int64)
        self._sums = np.zeros((NUM_BINS, 5), np.float64)
        self.first = self.current = int(now // BIN_S)

    def advance(self, now: float) -> None:
        """Forget what is too old at `now`."""
        current = int(now // BIN_S)
        if current > self.current:
            old = np.arange(max(self.current + 1, current - NUM_BINS + 1), current + 1) % NUM_BINS
            self._times[:, old] = 0
            self._sums[old] = 0
            self.current = current

    def add(self, now: float, what: int, amount: float) -> None:
        """Count something."""
        self.advance(now)
        self._sums[self.current % NUM_BINS, what] += amount

    def time(self, now: float, which: int, seconds: float, weight: int = 1) -> None:
        """Note how long something took."""
        self.advance(now)
        bucket = int(log10(max(seconds, _LEAST_S) / _LEAST_S) * _PER_DECADE)
        self._times[which, self.current % NUM_BINS, min(bucket, _BUCKETS - 1)] += weight

    def rows(self, first: int) -> list[list[float | None]]:
        """Of each whole bin from `first` on: TTFT and TPOT at 50 and 95 %, output tokens a second, hit ratio."""
        bins = range(max(first, self.oldest), self.current)
        return [self._row(index) for index in bins]

    @property
    def oldest(self) -> int:
        """The first bin that is still known."""
        return max(self.first, self.current - NUM_BINS + 1)

    def now(self) -> dict[str, Any]:
        """Percentiles of the last minute and speeds of the last whole bins."""
        lately = np.arange(max(self.first, self.current - _LATELY), self.current + 1) % NUM_BINS
        speed = np.arange(max(self.first, self.current - _SPEED), max(self.current, self.first + 1)) % NUM_BINS
        sums, pace = self._sums[lately].sum(0), self._sums[speed].sum(0) / (len(speed) * BIN_S)
        return {
            "ttft": _percentiles(self._times[_TTFT, lately].sum(0)),
            "tpot": _percentiles(self._times[_TPOT, lately].sum(0)),
            "output_per_s": _short(pace[OUTPUT]),
            "prompt_per_s": _short(pace[PROMPT]),
            "hit_ratio": _ratio(sums[CACHED], sums[PROMPT]),
            "ended": int(sums[ENDED]),
            "refused": int(sums[REFUSED]),
        }

    def _row(self, index: int) -> list[float | None]:
        at = index % NUM_BINS
        sums = self._sums[at]
        return [
            *_percentiles(self._times[_TTFT, at]), *_percentiles(self._times[_TPOT, at]),
            _short(sums[OUTPUT] / BIN_S), _ratio(sums[CACHED], sums[PROMPT]),
        ]  # fmt: skip


class LiveFigures:
    """An observer of requests. `bins` and `ended` are what it has seen."""

    def __init__(self, clock: Clock, tenant_ids: dict[str, str]) -> None:
        self.bins = Bins(clock.now())
        self.ended_ones: deque[Ended] = deque(maxlen=_NUM_ENDED)
        self._clock = clock
        self._tenant_ids = tenant_ids  # by name
        self._num_ended = 0
        self._last: dict[int, tuple[RequestRecord, float]] = {}  # when each open stream got its latest tokens

    def accepted(self, record: RequestRecord) -> None:
        """Nothing: the engine tells of requests that wait."""

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """Times of streams are taken as their tokens leave; those of whole answers when they end."""
        self.bins.add(now, OUTPUT, num_tokens)
        if not record.streams:
            return
        _, last = self._last.get(id(record), (record, None))
        if last is None:
            self.bins.time(now, _TTFT, now - record.arrival)
        else:
            self.bins.time(now, _TPOT, (now - last) / num_tokens, num_tokens)
        if last is not None or len(self._last) < _NUM_OPEN:
            self._last[id(record)] = record, now

    def ended(self, record: RequestRecord) -> None:
        """See `RequestObserver.ended`."""
        self._last.pop(id(record), None)
        now = self._clock.now()
        if not record.strategy:  # it was never queued
            self.bins.add(now, REFUSED, 1)
            return
        self.bins.add(now, ENDED, 1)
        self.bins.add(now, PROMPT, record.num_prompt)
        self.bins.add(now, CACHED, record.num_cached)
        if not record.streams:
            self._note_whole(record, now)
        self._num_ended += 1
        self.ended_ones.append(Ended(self._num_ended, record, self._tenant_ids.get(record.tenant, "")))

    def _note_whole(self, record: RequestRecord, now: float) -> None:
        for metrics in record.metrics:
            if metrics.first_token is not None:
                self.bins.time(now, _TTFT, metrics.first_token - record.arrival)
            times = metrics.token_times
            if len(times) > 1:
                self.bins.time(now, _TPOT, (times[-1] - times[0]) / (len(times) - 1), len(times) - 1)


def _percentiles(counts: "np.ndarray[Any, np.dtype[np.int64]]") -> Sequence[float | None]:
    """At 50 and 95 %, in seconds, to within a twentieth; None where nothing was counted."""
    total = int(counts.sum())
    if not total:
        return [None, None]
    upto = np.cumsum(counts)
    return [_middle(int(np.searchsorted(upto, share * total))) for share in (0.5, 0.95)]


def _middle(bucket: int) -> float:
    return float(f"{_LEAST_S * 10 ** ((bucket + 0.5) / _PER_DECADE):.3g}")


def _ratio(part: float, whole: float) -> float | None:
    return None if whole <= 0 else round(min(1.0, part / whole), 4)


def _short(value: float) -> float:
    return round(float(value), 1)
