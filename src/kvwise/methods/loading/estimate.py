"""How long a transfer and a prefill take, learnt from those that were; and what a decision has cost in hindsight."""

import math
from collections import deque
from itertools import combinations
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_LINK_WINDOW = 12  # samples: a change of speed is in the majority after 7, and the old speed is gone after 12
_PATIENCE = 4
_PREFILL_WINDOW = 16
_FORGETTING = 0.85  # weight of a sample relative to the next one
# Latencies that a link may have, in units of the mean transfer's bytes over bandwidth.
_LATENCIES = np.concatenate([[0.0], np.logspace(-3, 3, 97)])
_SHORTEST_S = 1e-9  # below what any clock tells


class LinkEstimate:
    """Seconds of a transfer: latency + bytes / bandwidth, from the latest transfers. Thread-safe.

    Fitted to the logarithm of the times by least absolute errors, capped: outliers move nothing, and a change of speed
    is followed once the newer samples are the majority, upwards as fast as downwards. Among fits that are equally
    good (all transfers were of one size) the one with the least latency is taken. None before the first sample.

    A transfer that was given up counts as one that took as long as that. Where a link looks so slow that nothing is
    loaded over it any more, nothing is measured either: tell it by `skipped`, and after `patience` times in a row the
    estimate is unknown again, so that the next request tries.
    """

    def __init__(self, window: int = _LINK_WINDOW, patience: int = _PATIENCE) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=window)
        self._patience = patience
        self._skipped = 0
        self._fit: tuple[float, float] | None = None  # latency in seconds, seconds per byte
        self._lock = Lock()

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A transfer of `num_bytes` bytes took `seconds`. ValueError for what cannot be (negative, not finite)."""
        if num_bytes <= 0 or not 0 <= seconds < math.inf:
            raise ValueError(f"no transfer: {num_bytes} bytes in {seconds} s")
        with self._lock:
            self._samples.append((num_bytes, max(seconds, _SHORTEST_S)))
            self._fit, self._skipped = None, 0

    def skipped(self) -> None:
        """A request could have used this link and was computed instead, by reason of this estimate."""
        with self._lock:
            self._skipped += 1

    def seconds(self, num_bytes: int) -> float | None:
        """Of a transfer of so many bytes alone on the link; None: unknown."""
        with self._lock:
            if not self._samples or self._skipped >= self._patience:
                return None
            if self._fit is None:
                self._fit = _fit_line(np.array(self._samples))
            latency, per_byte = self._fit
        return latency + per_byte * num_bytes


class PrefillEstimate:
    """Seconds of a chunked prefill, from the latest steps. Thread-safe.

    A step that computes n tokens after c others takes e + a*n + b*n*c seconds (b: attention reads what is before),
    fitted by least squares with forgetting, no coefficient below 0. What the samples do not tell apart (all had one
    size, or one context) stays as it was believed before; the first sample is believed to be a cost per token. None
    before it. After 16 samples nothing older counts.
    """

    def __init__(self, window: int = _PREFILL_WINDOW) -> None:
        self._samples: deque[tuple[int, int, float]] = deque(maxlen=window)
        self._cost: Floats | None = None  # e, a, b
        self._is_new = False  # samples that the cost does not contain yet
        self._largest = 1
        self._lock = Lock()

    def observe(self, num_tokens: int, context_start: int, seconds: float) -> None:
        """A step computed `num_tokens` of a prompt after `context_start` others; the whole step took `seconds`.

        Whatever else the step computed is part of the price: that is how a small share of the device shows.
        """
        if num_tokens <= 0 or context_start < 0 or not 0 <= seconds < math.inf:
            raise ValueError(f"no prefill: {num_tokens} tokens after {context_start} in {seconds} s")
        with self._lock:
            self._samples.append((num_tokens, context_start, max(seconds, _SHORTEST_S)))
            self._largest = max(self._largest, num_tokens)
            self._is_new = True

    def seconds(self, start: int, stop: int) -> float | None:
        """To compute tokens [start, stop) of a prompt, in steps as large as the largest so far; None: unknown."""
        with self._lock:
            if not self._samples:
                return None
            if self._is_new:
                self._cost = _fit_cost(np.array(self._samples), self._cost)
                self._is_new = False
            assert self._cost is not None
            fixed, per_token, per_pair = (float(c) for c in self._cost)
        num_tokens = max(0, stop - start)
        middle = start + (num_tokens - 1) / 2  # mean number of tokens before each
        return float(fixed * -(-num_tokens // self._largest) + num_tokens * (per_token + per_pair * middle))


class Hindsight(NamedTuple):
    """What became of a decision, in seconds: how long it took, and what the two fixed choices would have (or None)."""

    actual_s: float
    compute_s: float | None
    load_s: float | None

    @property
    def regret(self) -> float | None:
        """Seconds lost against the better fixed choice (negative: won); None if neither is known."""
        known = [seconds for seconds in (self.compute_s, self.load_s) if seconds is not None]
        return self.actual_s - min(known) if known else None


def regret(actual_s: float, compute_s: float | None, load_s: float | None) -> float | None:
    """Seconds lost against the better of computing and loading everything; `Hindsight` as one call."""
    return Hindsight(actual_s, compute_s, load_s).regret


def _fit_line(samples: Floats) -> tuple[float, float]:
    """Latency and seconds per byte that explain samples [n, (bytes, seconds)] best."""
    num_bytes, seconds = samples.T
    latencies = _LATENCIES * num_bytes.mean()  # in bytes
    off = np.log(seconds) - np.log(latencies[:, None] + num_bytes)  # [candidates, n]
    scale = np.median(off, axis=1)
    errors = np.minimum(np.abs(off - scale[:, None]), 1.0).sum(1)  # capped: an outlier has one vote, however far off
    best = int(np.argmax(errors <= errors.min() + 1e-9))
    per_byte = math.exp(scale[best])
    return float(latencies[best] * per_byte), per_byte


def _fit_cost(samples: Floats, believed: Floats | None) -> Floats:
    """Non-negative [fixed, per token, per token and context] for samples [n, (tokens, context, seconds)]."""
    num_tokens, context, seconds = samples.T
    table = np.stack([np.ones_like(num_tokens), num_tokens, num_tokens * (context + (num_tokens - 1) / 2)], 1)
    scale = np.maximum(np.sqrt((table**2).mean(0)), 1e-12)  # columns of one size, so that none is preferred
    if believed is None:
        believed = np.array([0.0, seconds[0] / num_tokens[0], 0.0])
    weights = _FORGETTING ** np.arange(len(samples))[::-1]
    weights /= weights.sum()
    scaled = table / scale
    # A whiff of what was believed decides where the samples do not.
    square = (scaled * weights[:, None]).T @ scaled
    ridge = 1e-4 * np.eye(3)
    right = (scaled * weights[:, None]).T @ seconds + ridge @ (believed * scale)
    cost: Floats = _non_negative(square + ridge, right) / scale
    return cost


def _non_negative(square: Floats, right: Floats) -> Floats:
    """The x >= 0 that makes x' square x / 2 - right' x least: tried over all sets of coefficients that are not 0."""
    best, least = np.zeros(3), 0.0
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            some = np.zeros(3)
            some[list(chosen)] = np.linalg.solve(square[np.ix_(chosen, chosen)], right[list(chosen)])
            value = float(some @ square @ some / 2 - right @ some)
            if (some >= 0).all() and value < least:
                best, least = some, value
    return best
