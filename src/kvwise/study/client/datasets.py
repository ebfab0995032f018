"""The requests of a run, drawn or read: random prompts, turns, traces, files."""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from kvwise.study.arrivals import arrival_times, spread_ties
from kvwise.study.client.files import read_turns
from kvwise.study.client.options import Dataset, Traffic
from kvwise.study.client.prompts import DEFAULT_OUTPUT, Ask, Conversation, Maker
from kvwise.study.lengths import Uniform, draw
from kvwise.study.traces import TraceRequest, read_trace, trace_prompt

_TIE_S = 1.0  # traces are often quantised to a second or more; equal times are spread over so many


def conversations(traffic: Traffic, maker: Maker) -> list[Conversation]:
    """All of a run, by time. Equal seeds give equal traffic. UsageError for a file that cannot be read."""
    rng = np.random.default_rng(traffic.seed)
    if traffic.dataset is Dataset.MOONCAKE:
        return _from_trace(traffic, maker, rng)
    if traffic.dataset is Dataset.RANDOM:
        found: Iterable[tuple[Ask, ...]] = ((ask,) for ask in _random(traffic, maker, rng))
    elif traffic.dataset is Dataset.MULTI_TURN and traffic.path is None:
        found = _random_turns(traffic, maker, rng)
    else:
        found = read_turns(traffic, maker, rng)
    chosen = _limited(found, traffic.count)
    num_turns = sum(map(len, chosen))
    rate = math.inf if traffic.rate is None else traffic.rate * len(chosen) / num_turns
    times = arrival_times(len(chosen), rate, traffic.burstiness, rng)
    return [Conversation(i, float(times[i]), turns, traffic.think_s) for i, turns in enumerate(chosen)]


def _limited(found: Iterable[tuple[Ask, ...]], count: int) -> list[tuple[Ask, ...]]:
    """The first conversations that have `count` turns together; the last one may be cut."""
    chosen, left = [], count
    for turns in found:
        chosen.append(turns[:left])
        left -= len(chosen[-1])
        if not left:
            break
    return chosen


def _lengths(middle: int, ratio: float, count: int, rng: np.random.Generator) -> np.ndarray:
    low, high = max(1, math.floor(middle * (1 - ratio))), math.ceil(middle * (1 + ratio))
    return draw(Uniform(kind="uniform", low=low, high=high), count, rng)


def _random(traffic: Traffic, maker: Maker, rng: np.random.Generator) -> list[Ask]:
    """Unrelated prompts behind a common prefix."""
    count, size = traffic.count, maker.vocabulary.size
    prefix = rng.integers(0, size, size=traffic.prefix_len)
    inputs = _lengths(traffic.input_len, traffic.range_ratio, count, rng)
    outputs = _lengths(traffic.output_len or DEFAULT_OUTPUT, traffic.range_ratio, count, rng)
    seeds = rng.integers(0, 2**63, size=count)

    def numbers(seed: int, length: int) -> np.ndarray:
        return np.concatenate([prefix, np.random.default_rng(seed).integers(0, size, size=length)])

    return [
        maker.ask(partial(numbers, int(seed), int(length)), len(prefix) + int(length), int(output))
        for seed, length, output in zip(seeds, inputs, outputs, strict=True)
    ]


def _random_turns(traffic: Traffic, maker: Maker, rng: np.random.Generator) -> list[tuple[Ask, ...]]:
    """Conversations of random turns; the first one holds the prefix, like a system prompt."""
    size, num_turns = maker.vocabulary.size, traffic.num_turns
    prefix = rng.integers(0, size, size=traffic.prefix_len)
    count = math.ceil(traffic.count / num_turns) * num_turns
    inputs = _lengths(traffic.input_len, traffic.range_ratio, count, rng)
    outputs = _lengths(traffic.output_len or DEFAULT_OUTPUT, traffic.range_ratio, count, rng)
    asks = []
    for index in range(count):
        numbers = rng.integers(0, size, size=inputs[index])
        whole = np.concatenate([prefix, numbers]) if index % num_turns == 0 else numbers
        asks.append(maker.ask(partial(_same, whole), len(whole), int(outputs[index]), text=True))
    return [tuple(asks[i : i + num_turns]) for i in range(0, count, num_turns)]


def _same(numbers: np.ndarray) -> np.ndarray:
    return numbers


def _from_trace(traffic: Traffic, maker: Maker, rng: np.random.Generator) -> list[Conversation]:
    requests = read_trace(Path(traffic.path or ""), block_size=traffic.block_tokens, limit=traffic.count)
    times = _trace_times(requests, traffic)
    scale, out = traffic.length_scale, []
    for index, request in enumerate(requests):
        make = partial(
            trace_prompt,
            request,
            block_size=traffic.block_tokens,
            length_scale=scale,
            vocab_size=maker.vocabulary.size,
            seed=traffic.seed,
        )
        output = traffic.output_len or max(1, round(request.output_length * scale))
        length = request.input_length if scale == 1 else len(make())
        out.append(Conversation(index, float(times[index]), (maker.ask(make, length, output),)))
    return out


def _trace_times(requests: list[TraceRequest], traffic: Traffic) -> np.ndarray:
    """From the first request on: the trace's own times, or scaled to a mean rate with its bursts kept."""
    times = np.array([request.arrival_s for request in requests])
    times = spread_ties(times, _TIE_S) - times[0]
    if traffic.rate is None:
        return np.asarray(times * traffic.time_scale)
    if math.isinf(traffic.rate) or times[-1] == 0:
        return np.zeros(len(times))
    return np.asarray(times * (len(times) / traffic.rate / times[-1]))
