"""Traces: spans and histograms by the conventions, as the SDK's in-memory exporters got them."""

import asyncio
import builtins
import runpy
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvwise.core.clock import Clock, VirtualClock
from kvwise.core.errors import UsageError
from kvwise.server.context import Server
from kvwise.server.observing import tracing as tracing_module
from kvwise.server.observing.metrics import Metrics
from kvwise.server.observing.observers import observe
from kvwise.server.observing.request_log import RequestLog
from kvwise.server.observing.tracing import Tracing, open_tracing
from tests.server.telling import a_record, ask, some_metrics, started

WALL = 1_000_000.0  # seconds since 1970, when the clock says 20
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Told(NamedTuple):
    tracing: Tracing
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    @property
    def histograms(self) -> dict[str, Any]:
        """Name -> its only data point."""
        data: Any = self.reader.get_metrics_data()
        found = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            (found[metric.name],) = metric.data.data_points
            assert metric.unit == "s"
        return found


def tracing(clock: Clock | None = None) -> Told:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(shutdown_on_exit=False), MeterProvider([reader], shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    clock = clock or VirtualClock(20.0)
    return Told(Tracing("tiny", clock, tracers, meters, lambda: None, wall=lambda: WALL), exporter, reader)


def test_a_request_is_a_span_of_the_conventions() -> None:
    told = tracing()
    told.tracing.accepted(a_record())
    told.tracing.ended(a_record(num_cached=64))
    (span,) = told.spans
    assert span.name == "chat tiny"
    assert span.kind is SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    wanted = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "kvwise", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny", "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 64,
        "http.route": "/v1/chat/completions", "http.response.status_code": 200, "kvwise.strategy": "prefix",
    }  # fmt: skip
    assert span.attributes is not None
    assert {name: span.attributes[name] for name in wanted} == wanted
    assert span.attributes["kvwise.queue_s"] == pytest.approx(0.1)


def test_its_times_are_those_of_the_request() -> None:
    """It arrived at 10 s and ended at 12 s on a clock that says 20 s now."""
    told = tracing()
    told.tracing.ended(a_record())
    (span,) = told.spans
    assert span.start_time == int((WALL - 10) * 1e9)
    assert span.end_time == int((WALL - 8) * 1e9)
    assert [(event.name, event.timestamp) for event in span.events] == [("first token", int((WALL - 9.5) * 1e9))]


def test_it_is_a_child_of_the_clients_span() -> None:
    told = tracing()
    told.tracing.ended(a_record(traceparent=f"00-{TRACE}-{PARENT}-01"))
    (span,) = told.spans
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT


@pytest.mark.parametrize("bad", ["", "00-zz-1-01", f"00-{'0' * 32}-{PARENT}-01", "\n" * 9, "9" * 10_000])
def test_a_traceparent_that_makes_no_sense_begins_a_trace(bad: str) -> None:
    told = tracing()
    told.tracing.ended(a_record(traceparent=bad))
    (span,) = told.spans
    assert span.parent is None


def test_a_client_that_is_not_sampled_is_not_told_of() -> None:
    told = tracing()
    told.tracing.ended(a_record(traceparent=f"00-{TRACE}-{PARENT}-00"))
    assert told.spans == ()


def test_histograms_of_the_conventions() -> None:
    told = tracing()
    told.tracing.ended(a_record())
    found = told.histograms
    assert {name: point.sum for name, point in found.items()} == {
        "gen_ai.server.request.duration": pytest.approx(2.0),
        "gen_ai.server.time_to_first_token": pytest.approx(0.5),
        "gen_ai.server.time_per_output_token": pytest.approx(0.75),
    }
    assert found["gen_ai.server.request.duration"].explicit_bounds[-1] == 81.92
    assert found["gen_ai.server.time_to_first_token"].explicit_bounds[:2] == (0.001, 0.005)
    attributes = dict(found["gen_ai.server.request.duration"].attributes)
    assert attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "kvwise", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "code"), [(400, StatusCode.UNSET), (503, StatusCode.ERROR), (200, StatusCode.ERROR)]
)
def test_errors_are_told_by_their_type(status: int, code: StatusCode) -> None:
    """By the conventions of HTTP a client's fault is no fault of the server; one in mid-stream is."""
    told = tracing()
    told.tracing.ended(a_record(status=status, error="some_code"))
    (span,) = told.spans
    assert span.status.status_code is code
    assert span.attributes is not None
    assert span.attributes["error.type"] == "some_code"
    assert told.histograms.keys() == {"gen_ai.server.request.duration"}


def test_a_request_that_never_began_is_told_of() -> None:
    told = tracing()
    told.tracing.ended(
        a_record(status=401, error="invalid_api_key", metrics=[], first_token=None, finished=None, finish_reasons=[])
    )
    (span,) = told.spans
    assert span.end_time == int(WALL * 1e9)


def test_nothing_says_who_asked_or_what() -> None:
    told = tracing()
    secret = {"user": "ann", "session": "ann-1", "tenant": "ann-inc", "prompt": "ann asks", "model": "ann-model"}
    told.tracing.ended(a_record(**secret, metrics=[some_metrics()]))
    assert "ann" not in told.spans[0].to_json()
    assert "ann" not in str(told.histograms)


def test_real_requests_are_told_of(make: Callable[..., Server]) -> None:
    server = make()
    told = tracing(server.service.clock)
    server.observers.append(told.tracing)

    async def main() -> None:
        async with started(server):
            await asyncio.gather(*(ask(server, list(range(40, 80))) for _ in range(3)))

    asyncio.run(main())
    assert [span.name for span in told.spans] == ["text_completion tiny"] * 3
    assert told.histograms["gen_ai.server.time_to_first_token"].count == 3


# -- opening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "localhost:4318", "grpc://localhost", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(bad: str) -> None:
    with pytest.raises(UsageError, match=r"write it like http://localhost:4318"):
        open_tracing(bad, "tiny", VirtualClock())


@pytest.fixture
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.usefixtures("no_telemetry")
def test_without_the_extra_there_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match=r"pip install 'kvwise\[otel\]'") as refused:
        open_tracing("http://localhost:4318", "tiny", VirtualClock())
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("no_telemetry")
def test_the_module_can_be_imported_without_the_extra() -> None:
    assert "open_tracing" in runpy.run_path(str(Path(tracing_module.__file__)), run_name="probe")


def test_a_collector_gets_spans_and_histograms() -> None:
    paths = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        told = open_tracing(f"http://127.0.0.1:{collector.server_port}/", "tiny", VirtualClock(20.0))
        told.ended(a_record())
        told.close()
        collector.shutdown()
        thread.join(30)
    assert sorted(paths) == ["/v1/metrics", "/v1/traces"]


def test_a_server_is_observed_as_its_settings_ask(make: Callable[..., Server]) -> None:
    server = make()
    close = observe(server)
    assert [type(one) for one in server.observers] == [Metrics, RequestLog]
    close()
    traced = make(settings={"otlp_endpoint": "http://127.0.0.1:9"})  # nobody listens: that harms nobody
    close = observe(traced)
    assert {type(one) for one in traced.observers} == {Metrics, RequestLog, Tracing}
    close()
