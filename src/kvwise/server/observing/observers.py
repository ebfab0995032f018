"""Who is told of requests: metrics, the log, and traces where an endpoint is given."""

from collections.abc import Callable

from kvwise.server.context import Server
from kvwise.server.observing.metrics import Metrics
from kvwise.server.observing.request_log import RequestLog
from kvwise.server.observing.tracing import open_tracing


def observe(server: Server) -> Callable[[], None]:
    """Add the observers that the settings ask for; what it returns writes and sends the rest, when all have ended.

    UsageError if traces are asked for and cannot be made.
    """
    settings = server.settings
    log = RequestLog(prompts=settings.log_prompts)
    closing: list[Callable[[], None]] = [log.close]
    if settings.otlp_endpoint is not None:
        tracing = open_tracing(settings.otlp_endpoint, server.model_names[0], server.service.clock)
        server.observers.append(tracing)
        closing.append(tracing.close)
    server.observers += [Metrics(server), log]

    def close() -> None:
        for one in closing:
            one()

    return close
