"""Figures of a run, under the keys and with the meanings of `vllm bench serve`, and a few of our own."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kvwise.study.client.answer import Answer
from kvwise.study.client.load import Outcome
from kvwise.study.client.options import Wanted

Figures = dict[str, object]
LATE_MS = 10.0  # a client that sends later than this measures itself
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times",
           "generated_texts", "errors")  # fmt: skip


def figures(outcome: Outcome, wanted: Wanted) -> Figures:
    """All figures. Those of latency are over completed requests; a list has an entry for each that ended."""
    answers = sorted(outcome.answers, key=lambda a: (a.scheduled, a.conversation, a.turn))
    done = [a for a in answers if a.ok]
    seconds = outcome.duration_s or float("nan")
    num_input = sum(prompt_tokens(a, wanted) for a in done)
    num_output = sum(a.num_output for a in done)
    good = sum(is_good(a, wanted) for a in done)
    out: Figures = {
        "duration": outcome.duration_s,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / seconds,
        "request_goodput": good / seconds if wanted.goodput else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_output_tokens_per_s": max(tokens_per_second(done), default=0.0),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for name, values in _values(done).items():
        if name in wanted.metrics:
            out |= spread(name, values, wanted.percentiles)
    return out | _own(outcome, answers, done) | _details(answers, wanted)


def spread(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> Figures:
    """Mean, median, standard deviation (of all values) and percentiles (linear), in milliseconds; 0 without values."""
    values = np.asarray(seconds if len(seconds) else [0.0]) * 1e3
    out: Figures = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return out | {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}


def is_good(answer: Answer, wanted: Wanted) -> bool:
    """Whether a completed request keeps every limit; with fewer than two tokens it keeps that of `tpot`."""
    seconds = {"ttft": answer.ttft, "tpot": answer.tpot, "e2el": answer.latency}
    return all(seconds[name] <= limit / 1e3 for name, limit in wanted.goodput.items())


def prompt_tokens(answer: Answer, wanted: Wanted) -> int:
    """Of the prompt, as the server told, or the data set."""
    said, told = answer.said_prompt, answer.num_prompt
    first, second = (said, told) if wanted.trust_prompts else (told, said)
    return first if first is not None else second or 0


def peak_concurrency(done: Sequence[Answer]) -> int:
    """The most requests under way at once; one that ends when another starts is not beside it."""
    events = sorted([(a.start, 1) for a in done] + [(a.start + a.latency, -1) for a in done])
    return int(max(np.cumsum([change for _, change in events]), default=0))


def tokens_per_second(done: Sequence[Answer]) -> list[float]:
    """Chunks with tokens in each second since the first request was sent."""
    if not done:
        return []
    first = min(a.start for a in done)
    times = [a.start + a.ttft + np.concatenate([[0.0], np.cumsum(a.itls)]) - first for a in done]
    return [float(count) for count in np.bincount(np.concatenate(times).astype(int))]


def _values(done: Sequence[Answer]) -> dict[str, list[float]]:
    return {
        "ttft": [a.ttft for a in done],
        "tpot": [a.tpot for a in done if a.num_output > 1],
        "itl": [itl for a in done for itl in a.itls],
        "e2el": [a.latency for a in done],
        "client_queue_time": [a.queue_s for a in done],
    }


def _own(outcome: Outcome, answers: Sequence[Answer], done: Sequence[Answer]) -> Figures:
    """What vLLM's client does not tell: refusals, errors by kind, ends, and whether the client itself kept up."""
    refused = [a for a in answers if a.refused]
    delays = np.asarray([a.send_delay_s for a in answers] or [0.0]) * 1e3
    return {
        "num_planned": outcome.num_planned,
        "interrupted": outcome.interrupted,
        "unfinished": outcome.num_unfinished,
        "errors_by_kind": dict(Counter(a.kind for a in answers if not a.ok).most_common()),
        "refused": len(refused),
        "refused_without_retry_after": sum(a.retry_after_s is None for a in refused),
        **spread("refusal", [a.decision_s for a in refused if a.decision_s is not None], (99.0,)),
        "finish_reasons": dict(Counter(a.finish_reason for a in done).most_common()),
        "cut_short": sum(a.finish_reason == "length" and a.num_output < a.max_tokens for a in done),
        "counted_by_chunks": sum(a.counted for a in done),
        "total_cached_tokens": sum(a.num_cached or 0 for a in done),
        "max_send_delay_ms": float(delays.max()),
        "p99_send_delay_ms": float(np.percentile(delays, 99)),
    }


def _details(answers: Sequence[Answer], wanted: Wanted) -> Figures:
    columns = (
        [prompt_tokens(a, wanted) for a in answers],
        [a.num_output if a.ok else 0 for a in answers],
        [a.ttft for a in answers],
        [a.itls for a in answers],
        [a.latency for a in answers],
        [a.start for a in answers],
        [a.queue_s for a in answers],
        [a.text for a in answers],
        [a.error for a in answers],
    )
    return dict(zip(DETAILS, columns, strict=True))
