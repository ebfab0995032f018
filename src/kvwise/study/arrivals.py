"""When requests arrive: open loop with Poisson or Gamma gaps."""

import math

import numpy as np


def arrival_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """`count` times in seconds from the cell's start, ascending; all 0 at rate inf.

    The gaps follow a Gamma law with shape `burstiness` (1: Poisson; below 1: bursts) and mean 1/rate. As in vLLM's
    benchmark they are then scaled so that the last request arrives at count/rate: with few requests a cell the drawn
    rate would else differ from the asked one by tens of percent.
    """
    if math.isinf(rate):
        return np.zeros(count)
    gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=count)
    times = np.cumsum(gaps)
    # A very bursty law can round every gap to 0; the requests then all come at the end of the window.
    return times * (count / rate / times[-1]) if times[-1] > 0 else np.full(count, count / rate)


def spread_ties(times: np.ndarray, width: float) -> np.ndarray:
    """Requests that share a time are spread evenly over the following `width` seconds, in order.

    Traces are often quantised to seconds; their bursts are then an artefact of the clock, not of the traffic.
    """
    out = times.astype(float).copy()
    _, first, counts = np.unique(times, return_index=True, return_counts=True)
    for start, ties in zip(first, counts, strict=True):
        out[start : start + ties] += width * np.arange(ties) / ties
    return out
