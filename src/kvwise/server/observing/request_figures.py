"""What requests tell of themselves, as metrics: while their tokens come, and when they end."""

import re
from dataclasses import dataclass

import numpy as np

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis
from kvwise.core.output import Attestation, FinishReason, RequestMetrics
from kvwise.methods.catalogue import catalogue, parse
from kvwise.methods.loading.base import Decision
from kvwise.server.observing import metric_table as table
from kvwise.server.observing.engine_figures import EngineFigures
from kvwise.server.observing.metric_values import OTHER, Values
from kvwise.server.record import RequestRecord

_CODE = re.compile(r"[a-z][a-z0-9_]{0,47}")


@dataclass(slots=True)
class _Progress:
    """What was counted of a request that has not ended. It holds the record, so that the record's id stays its own."""

    record: RequestRecord
    num_tokens: int = 0
    has_begun: bool = False
    has_first: bool = False


class RequestFigures:
    """Puts what requests tell into `values`. No label says who sent a request, or anything that a client wrote."""

    def __init__(self, engines: EngineFigures, values: Values, num_engines: int) -> None:
        self._engines = engines
        self._values = values
        self._progress: dict[int, _Progress] = {}
        self._retentions = {kind.name for kind in catalogue() if kind.axis is Axis.RETENTION}
        self._method_of: dict[str, str] = {}  # by strategy
        for number in range(num_engines):
            self._begin(str(number))

    @property
    def num_open(self) -> int:
        """Requests that have begun to answer and not ended."""
        return len(self._progress)

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """See `RequestObserver.tokens`."""
        progress = self._progress.setdefault(id(record), _Progress(record))
        engine = self._engines.number_of(record.strategy)
        if record.streams and not progress.has_first:
            progress.has_first = True
            self._values.observe(engine, table.TTFT, now - record.arrival)
        self._count_tokens(engine, progress, num_tokens)

    def ended(self, record: RequestRecord) -> None:
        """See `RequestObserver.ended`."""
        progress = self._progress.pop(id(record), None) or _Progress(record)
        engine, values = self._engines.number_of(record.strategy), self._values
        if record.disconnected:
            values.add(engine, table.DISCONNECTED, 1)
        elif record.error is not None or record.status >= 400:
            values.add(engine, table.REFUSED, 1, _code(record))
        if record.status < 400 and (record.metrics or record.num_output):
            self._count_tokens(engine, progress, max(0, record.num_output - progress.num_tokens))
            self._note_request(engine, record, has_first=progress.has_first)
        for reason in record.finish_reasons:
            values.add(engine, table.SUCCESS, 1, reason if reason in set(FinishReason) else OTHER)
        for metrics in record.metrics:
            self._note_output(engine, metrics)
        for attestation in record.attestations:
            if attestation.tokens_dropped:
                values.add(engine, table.DROPPED, attestation.tokens_dropped, self._retention(attestation))

    def _begin(self, engine: str) -> None:
        for metric in table.REQUEST_METRICS:
            if not metric.labels:
                self._values.begin(engine, metric)
        for reason in FinishReason:
            self._values.begin(engine, table.SUCCESS, str(reason))
        for decision in Decision:
            self._values.begin(engine, table.DECISIONS, str(decision))

    def _count_tokens(self, engine: str, progress: _Progress, num_tokens: int) -> None:
        if not progress.has_begun:
            progress.has_begun = True
            self._values.add(engine, table.PROMPT_TOKENS, progress.record.num_prompt)
        progress.num_tokens += num_tokens
        self._values.add(engine, table.GENERATION_TOKENS, num_tokens)

    def _note_request(self, engine: str, record: RequestRecord, *, has_first: bool) -> None:
        values = self._values
        firsts = [one.first_token for one in record.metrics if one.first_token is not None]
        if firsts and not has_first:
            values.observe(engine, table.TTFT, min(firsts) - record.arrival)
        if record.finished is not None and record.error is None and not record.disconnected:
            values.observe(engine, table.E2E, record.finished - record.arrival)
        values.observe(engine, table.PROMPT, record.num_prompt)
        values.observe(engine, table.GENERATION, record.num_output)
        values.observe(engine, table.MAX_GENERATION, max((len(one.token_times) for one in record.metrics), default=0))

    def _note_output(self, engine: str, metrics: RequestMetrics) -> None:
        values, scheduled, first = self._values, metrics.first_scheduled, metrics.first_token
        if metrics.load is not None:
            known = metrics.load.decision in set(Decision)
            values.add(engine, table.DECISIONS, 1, metrics.load.decision if known else OTHER)
        if scheduled is None:
            return
        values.observe(engine, table.QUEUE, scheduled - metrics.arrival)
        if first is None or not metrics.token_times:
            return
        last = metrics.token_times[-1]
        values.observe(engine, table.PREFILL, first - scheduled)
        values.observe(engine, table.DECODE, last - first)
        values.observe(engine, table.INFERENCE, last - scheduled)
        gaps = np.diff(metrics.token_times)
        if len(gaps):
            values.observe_many(engine, table.ITL, gaps)
            values.observe(engine, table.TPOT, float(gaps.mean()))

    def _retention(self, attestation: Attestation) -> str:
        """The name of the method that dropped tokens; one nobody knew at the start is "other"."""
        strategy = attestation.strategy
        if strategy not in self._method_of and len(self._method_of) < 256:
            try:
                name = parse(strategy).retention.name
            except StrategyError:
                name = OTHER
            self._method_of[strategy] = name if name in self._retentions else OTHER
        return self._method_of.get(strategy, OTHER)


def _code(record: RequestRecord) -> str:
    """The error's code if it looks like one of ours, else the status."""
    if record.error is not None and _CODE.fullmatch(record.error):
        return record.error
    return str(record.status) if 400 <= record.status < 600 else OTHER
