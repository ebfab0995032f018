"""`/metrics` for Prometheus: names of kvwise's own and, if asked for, vLLM's, so that dashboards made for it work."""

from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.responses import Response

from kvwise.engine.service import State
from kvwise.engine.sizing import max_model_len
from kvwise.server.context import Server
from kvwise.server.gates import admin
from kvwise.server.observing import metric_table as table
from kvwise.server.observing.engine_figures import EngineFigures
from kvwise.server.observing.metric_values import Values
from kvwise.server.observing.request_figures import RequestFigures
from kvwise.server.observing.request_log import RequestLog
from kvwise.server.record import RequestRecord
from kvwise.server.strict import gated

FRESH_S = 0.5  # the page is made anew at most so often, however many ask for it
_SERVER = "0"  # the engine label of what no engine counts


class Metrics(Collector):
    """All metrics of one server, and the page that tells them. An observer of its requests.

    The page says nothing of tenants, users, sessions or prompts. `registry` is its own: two servers in one process do
    not meet.
    """

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        self.num_renders = 0
        service = server.service
        self._server = server
        self._prefixes = (table.OWN, table.TWIN) if server.settings.vllm_metrics else (table.OWN,)
        self._values = Values(server.model_names[0], max_model_len(service.loaded, service.config))
        self._engines = EngineFigures(service, self._values)
        self._requests = RequestFigures(self._engines, self._values, len(service.strategies))
        self._page: tuple[float, bytes] | None = None
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # -- what requests tell -------------------------------------------------------------------------------------

    def accepted(self, record: RequestRecord) -> None:
        """Nothing is told of a request that has only been queued: `num_requests_waiting` has it."""

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """See `RequestObserver`."""
        self._requests.tokens(record, num_tokens, now)

    def ended(self, record: RequestRecord) -> None:
        """See `RequestObserver`."""
        self._requests.ended(record)

    # -- the page -----------------------------------------------------------------------------------------------

    def page(self) -> bytes:
        """The exposition, at most `FRESH_S` old by the service's clock: a storm of scrapes costs one page."""
        now = self._server.service.clock.now()
        if self._page is None or now - self._page[0] >= FRESH_S:
            self.num_renders += 1
            self._update()
            self._page = now, generate_latest(self.registry)
        return self._page[1]

    def describe(self) -> Iterator[Family]:
        """Nothing to register beforehand: all names are ours."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """All metrics, once for each prefix."""
        for prefix in self._prefixes:
            yield from self._values.families(prefix)

    def _update(self) -> None:
        values, server = self._values, self._server
        self._engines.update()
        for state in State:
            values.set(_SERVER, table.STATE, state is server.service.health, str(state))
        logs = [one for one in server.observers if isinstance(one, RequestLog)]
        values.raise_to(_SERVER, table.LOG_LOST, sum(log.num_lost for log in logs))
        values.raise_to(_SERVER, table.RENDERS, self.num_renders)


def routes(server: Server) -> APIRouter:
    """`/metrics`. Its `Metrics` joins the server's observers.

    Where several tenants are served it needs the administration's key: from totals, read often, one tenant could tell
    what another one does.
    """
    metrics = next((one for one in server.observers if isinstance(one, Metrics)), None)
    if metrics is None:
        metrics = Metrics(server)
        server.observers.append(metrics)
    is_locked = server.settings.keys_file is not None and not server.settings.open_metrics
    router = APIRouter(tags=["metrics"], route_class=gated(admin(server)) if is_locked else APIRoute)
    page = metrics.page

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def scrape() -> Response:
        """All metrics in Prometheus' text format; docs/observability.md lists them."""
        return Response(page(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
