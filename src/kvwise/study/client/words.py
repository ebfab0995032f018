"""The figures of a run in words: rows of a table, and what a reader should be warned of."""

from typing import cast

from kvwise.study.client.figures import DETAILS, LATE_MS, Figures

_NAMES = {
    "completed": "Successful requests",
    "failed": "Failed requests",
    "max_concurrency": "Maximum request concurrency",
    "duration": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_cached_tokens": "of them cached",
    "total_output_tokens": "Total generated tokens",
    "request_throughput": "Request throughput (req/s)",
    "request_goodput": "Request goodput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s)",
    "max_concurrent_requests": "Peak concurrent requests",
    "total_token_throughput": "Total token throughput (tok/s)",
    "refused": "Refused (429, 503)",
    "median_refusal_ms": "Median time to refuse (ms)",
    "p99_refusal_ms": "P99 time to refuse (ms)",
    "max_send_delay_ms": "Latest sending (ms)",
}
_SHORT = {
    "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL", "client_queue_time": "Client Queue Time",
}  # fmt: skip


def rows(figures: Figures) -> list[tuple[str, str]]:
    """(name, value) of each figure that has something to tell."""
    out = [(name, _number(figures[key])) for key, name in _NAMES.items() if _tells(figures, key)]
    for metric, short in _SHORT.items():
        for key, value in figures.items():
            statistic, _, rest = key.partition("_")
            if rest == f"{metric}_ms":
                out.append((f"{statistic.capitalize()} {short} (ms)", _number(value)))
    kinds = cast(dict[str, int], figures["errors_by_kind"])
    return out + [(f"Error: {kind}", str(count)) for kind, count in kinds.items()]


def warnings(figures: Figures) -> list[str]:
    """What makes the figures less than they seem, one line each."""
    out = []
    if (late := cast(float, figures["max_send_delay_ms"])) > LATE_MS:
        out.append(f"a request was sent {late:.1f} ms late: this client, not the server, was the limit")
    if short := figures["cut_short"]:
        out.append(f"{short} answers ended by length before they had the tokens asked for")
    if counted := figures["counted_by_chunks"]:
        out.append(f"the server told no usage for {counted} answers: their tokens are chunks, counted")
    if missing := figures["refused_without_retry_after"]:
        out.append(f"{missing} refusals had no Retry-After")
    if figures["completed"] == 0:
        first = next((e for e in cast(list[str], figures["errors"]) if e), "nothing was sent")
        out.append(f"no request completed: {first}")
    if figures["interrupted"]:
        out.append(f"interrupted: {figures['unfinished']} requests under way are not counted")
    return out


def without_details(figures: Figures) -> Figures:
    """The figures without lists of an entry per request."""
    return {key: value for key, value in figures.items() if key not in DETAILS}


def _tells(figures: Figures, key: str) -> bool:
    if key.endswith("refusal_ms"):
        return bool(figures["refused"])
    return figures.get(key) is not None and (key not in ("refused", "total_cached_tokens") or bool(figures[key]))


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
