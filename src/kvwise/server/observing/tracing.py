"""OpenTelemetry: a span and three histograms for each request, by the semantic conventions of generative AI.

The packages are the extra `otel`; they are imported only where an endpoint is given.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvwise.core.clock import Clock
from kvwise.core.errors import UsageError
from kvwise.server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Span, TracerProvider

SYSTEM = "kvwise"
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_MAX_CHARS = 256
# Upper bounds in seconds, as the conventions advise.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_Attributes = dict[str, str | int | float | bool | Sequence[str]]


class Tracing:
    """An observer that tells OpenTelemetry of each request when it has ended.

    A span is the child of the one that the client's `traceparent` names. No text of a request is told, and no user.
    """

    def __init__(
        self, model_name: str, clock: Clock, tracers: "TracerProvider", meters: "MeterProvider",
        close: Callable[[], None], wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._model_name = model_name
        self._clock = clock
        self._wall = wall
        self._close = close
        self._tracer = tracers.get_tracer(SYSTEM)
        meter = meters.get_meter(SYSTEM)

        def histogram(name: str, what: str, bounds: Sequence[float]) -> "Histogram":
            return meter.create_histogram(
                f"gen_ai.server.{name}", unit="s", description=what, explicit_bucket_boundaries_advisory=bounds
            )

        self._duration = histogram("request.duration", "From a request's arrival until its end.", _DURATION_S)
        self._ttft = histogram("time_to_first_token", "From a request's arrival until its first token.", _TTFT_S)
        self._token = histogram("time_per_output_token", "Mean time of an output's tokens after the first.", _TOKEN_S)

    def accepted(self, record: RequestRecord) -> None:
        """A request is told of at its end: its span begins at its arrival all the same."""

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """Likewise."""

    def ended(self, record: RequestRecord) -> None:
        """Tell of a request: its span, and where it came to that, its times."""
        common = self._common(record)
        end = record.finished if record.finished is not None else self._clock.now()
        first = _first_token(record)
        self._span(record, common, first, end)
        self._duration.record(end - record.arrival, common)
        if record.error is not None:
            return  # the other two are of successful requests
        if first is not None:
            self._ttft.record(first - record.arrival, common)
        for times in (one.token_times for one in record.metrics):
            if len(times) > 1:
                self._token.record((times[-1] - times[0]) / (len(times) - 1), common)

    def close(self) -> None:
        """Send what has not been sent, and end."""
        self._close()

    def _common(self, record: RequestRecord) -> _Attributes:
        told: _Attributes = {
            "gen_ai.operation.name": _OPERATIONS.get(record.route, "_OTHER"),
            "gen_ai.provider.name": SYSTEM,
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
        }
        if record.error is not None:
            told["error.type"] = record.error[:_MAX_CHARS]
        return told

    def _span(self, record: RequestRecord, common: Mapping[str, object], first: float | None, end: float) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": record.traceparent})
        span: Span = self._tracer.start_span(
            f"{common['gen_ai.operation.name']} {self._model_name}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={**common, **_of_request(record)},  # type: ignore[dict-item]
            start_time=self._unix_ns(record.arrival),
        )
        if first is not None:
            span.add_event("first token", timestamp=self._unix_ns(first))
        if record.error is not None and (record.status >= 500 or record.status < 400):  # the latter: in mid-stream
            span.set_status(Status(StatusCode.ERROR, record.error[:_MAX_CHARS]))
        span.end(self._unix_ns(end))

    def _unix_ns(self, at: float) -> int:
        """Nanoseconds since 1970 of a moment on the service's clock."""
        return int((self._wall() - self._clock.now() + at) * 1e9)


def open_tracing(endpoint: str, model_name: str, clock: Clock) -> Tracing:
    """Traces and metrics for a collector at `endpoint`, such as http://localhost:4318 (OTLP over HTTP).

    UsageError if the extra is not installed, or the endpoint is no http or https URL.
    """
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise UsageError(f"otlp_endpoint={endpoint!r} is no URL: write it like http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"otlp_endpoint={endpoint!r} needs OpenTelemetry, which is not installed ({error.name}): "
            "pip install 'kvwise[otel]', or leave the endpoint out"
        ) from None
    resource, base = Resource.create({"service.name": SYSTEM}), endpoint.rstrip("/")
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=5)))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=5))
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)

    def close() -> None:
        tracers.shutdown()
        meters.shutdown(timeout_millis=5000)

    return Tracing(model_name, clock, tracers, meters, close)


def _first_token(record: RequestRecord) -> float | None:
    if record.first_token is not None:
        return record.first_token
    return min((one.first_token for one in record.metrics if one.first_token is not None), default=None)


def _of_request(record: RequestRecord) -> _Attributes:
    """What a span says beside what the histograms say too."""
    told: _Attributes = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.response.id": record.request_id[:_MAX_CHARS],
        "gen_ai.response.finish_reasons": [str(reason) for reason in record.finish_reasons[:_MAX_CHARS]],
        "gen_ai.usage.input_tokens": record.num_prompt,
        "gen_ai.usage.output_tokens": record.num_output,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached,
        "kvwise.strategy": record.strategy,
        "kvwise.stream": record.streams,
        "kvwise.disconnected": record.disconnected,
    }
    scheduled = min((one.first_scheduled for one in record.metrics if one.first_scheduled is not None), default=None)
    if scheduled is not None:
        told["kvwise.queue_s"] = scheduled - record.arrival
    if record.metrics:
        told["kvwise.preemptions"] = sum(one.num_preemptions for one in record.metrics)
        told["kvwise.miss"] = str(record.metrics[0].miss)
    return told
