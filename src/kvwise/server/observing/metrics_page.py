"""docs/observability.md, made of the metrics themselves.

`python -m kvwise.server.observing.metrics_page > docs/observability.md` makes it anew; a test compares the two.
"""

from collections.abc import Sequence

from kvwise.server.observing.metric_table import (
    ENGINE_METRICS,
    OWN,
    REQUEST_METRICS,
    SERVER_METRICS,
    TWIN,
    UP_TO_LONGEST,
    Kind,
    Metric,
)

_PAGE = """# Watching a server

## Metrics

`GET /metrics` answers in Prometheus' text format. Nothing in it says who asked for what. It needs no key, unless there
are tenants (`--keys`): then it needs the administration's, for whoever reads totals often could tell what others do, or
`--open-metrics` where the network keeps tenants from it. Every name
begins with `{own}`; with `--vllm-metrics` those marked *twin* are told a second time under vLLM's own name
(`{twin}...`), with vLLM's labels and buckets, so that dashboards and autoscalers made for vLLM work unchanged.

Every metric has the labels `model_name` (the first name the model is served under, never what a client wrote) and
`engine` (a number: one for each strategy that requests may choose). No label holds a tenant, user, session, path or
anything else that a client can choose, and no metric has more than 64 series. The page is made at most twice a second,
however many ask for it. Counters go on when a switch of the strategy replaces an engine.

A block that is missing because only another tenant has it counts as `never stored`: whoever can read this page could
otherwise try prompts and learn what others have stored.

### Of requests

Told while tokens are handed over, and when a request ends. A request with n samples, or with several prompts, has
several outputs: times in the queue and in the engine, and the reasons of their ends, are by output; the time to the
first token, the latency and the token counts are by request.

{requests}

### Of engines

Read from each engine's own figures, at most a tenth of a second old.

{engines}

### Of the server

{server}

Beside these, the page has what every Prometheus client tells of its process (`process_resident_memory_bytes`,
`process_open_fds` and so on).

## Dashboard

`kvwise/server/observing/grafana.json` in the installed package is a Grafana dashboard of these metrics: import it and
choose the data source, the model and the engines at the top.

## One line for each request

When a request has ended, a line of JSON goes to the logger `kvwise.requests` if somebody gave it a handler, else to
stderr: ids, route, tenant, strategy, status, tokens (also those found in the cache, and those that methods dropped),
seconds in the queue, until the first token and until the end. User and session appear under pseudonyms that last as
long as the process. The text of prompts is never there, unless the server runs with `--log-prompts`; then its first
2000 characters. A thread writes: a full disk or a pipe that nobody reads holds no request up, and lines that could not
be written are counted in `{own}request_log_lost_total`.

## Traces

With `pip install 'kvwise[otel]'` and `--otlp-endpoint http://localhost:4318` every request becomes a span of kind
SERVER with the attributes of OpenTelemetry's conventions for generative AI (`gen_ai.operation.name`,
`gen_ai.usage.input_tokens` and so on), a child of the span that the client's `traceparent` names, and three histograms
are sent: `gen_ai.server.request.duration`, `gen_ai.server.time_to_first_token` and
`gen_ai.server.time_per_output_token`. No text and no user is sent.

The tables of this page are made by `python -m kvwise.server.observing.metrics_page`; a test compares the two.
"""


def document() -> str:
    """The text of docs/observability.md."""
    return _PAGE.format(
        own=OWN, twin=TWIN, requests=_table(REQUEST_METRICS), engines=_table(ENGINE_METRICS),
        server=_table(SERVER_METRICS),
    )  # fmt: skip


def _table(metrics: Sequence[Metric]) -> str:
    head = "| metric | type | own labels | what it is | twin |\n|---|---|---|---|---|"
    return "\n".join([head, *map(_row, metrics)])


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    what = metric.help
    if metric.kind is Kind.HISTOGRAM:
        until = "the model's length" if metric.buckets == UP_TO_LONGEST else f"{metric.buckets[-1]:g} s"
        what += f" Buckets up to {until}."
    return f"| `{OWN}{metric.name}` | {metric.kind} | {labels} | {what} | {'yes' if metric.twin else ''} |"


if __name__ == "__main__":
    print(document(), end="")
