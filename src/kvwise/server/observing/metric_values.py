"""Values of metrics, kept once and told under one prefix or two."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from kvwise.server.observing.metric_table import COMMON_LABELS, METRICS, OWN, Kind, Metric, bounds_of

Labels = tuple[str, ...]
MAX_SERIES = 64  # of one metric and engine, by its own labels: more than there are names of anything
OTHER = "other"


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus has them."""
        found, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else str(float(bound)), float(below)))
        return found


class Values:
    """What is known of every metric, by engine (its number) and by the metric's own labels.

    One writer: the event loop. A label value beyond `MAX_SERIES` of a metric is counted as "other", so that whatever
    finds its way into a label, the page stays small.
    """

    def __init__(self, model_name: str, longest: int) -> None:
        self._model_name = model_name
        self._longest = longest
        self._numbers: dict[Metric, dict[Labels, float]] = {m: {} for m in METRICS if m.kind is not Kind.HISTOGRAM}
        self._histograms: dict[Metric, dict[Labels, _Histogram]] = {m: {} for m in METRICS if m.kind is Kind.HISTOGRAM}

    def begin(self, engine: str, metric: Metric, *labels: str) -> None:
        """The series is there from now on, at 0 if nothing is known."""
        if metric.kind is Kind.HISTOGRAM:
            self._histogram(engine, metric)
        else:
            self.add(engine, metric, 0.0, *labels)

    def add(self, engine: str, metric: Metric, amount: float, *labels: str) -> None:
        """A counter grows."""
        series, key = self._numbers[metric], self._key(engine, metric, labels)
        series[key] = series.get(key, 0.0) + amount

    def set(self, engine: str, metric: Metric, value: float, *labels: str) -> None:
        """What a gauge is now."""
        self._numbers[metric][self._key(engine, metric, labels)] = value

    def raise_to(self, engine: str, metric: Metric, value: float, *labels: str) -> None:
        """A counter that somebody else counts is at `value` now; it never falls."""
        series, key = self._numbers[metric], self._key(engine, metric, labels)
        series[key] = max(series.get(key, 0.0), value)

    def forget(self, metric: Metric) -> None:
        """No series of a gauge is known; those that still are will be set."""
        self._numbers[metric].clear()

    def observe(self, engine: str, metric: Metric, value: float) -> None:
        """One observation of a histogram."""
        histogram = self._histogram(engine, metric)
        histogram.counts[bisect_left(histogram.bounds, value)] += 1
        histogram.total += value

    def observe_many(self, engine: str, metric: Metric, values: npt.NDArray[np.float64]) -> None:
        """Observations of a histogram, at the price of one."""
        histogram = self._histogram(engine, metric)
        places = np.searchsorted(histogram.bounds, values)
        for place, count in enumerate(np.bincount(places).tolist()):
            histogram.counts[place] += count
        histogram.total += float(values.sum())

    def replace(self, engine: str, metric: Metric, counts: Sequence[int], total: float) -> None:
        """A histogram that somebody else counts, by bucket."""
        histogram = self._histogram(engine, metric)
        histogram.counts, histogram.total = list(counts), total

    def families(self, prefix: str) -> Iterator[Family]:
        """All metrics with a prefix, as prometheus_client has them; with vLLM's, those that vLLM has too."""
        for metric in METRICS:
            if prefix == OWN or metric.twin:
                yield self._family(prefix, metric)

    def _family(self, prefix: str, metric: Metric) -> Family:
        name, labels = prefix + metric.name, (*COMMON_LABELS, *metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            told = HistogramMetricFamily(name, metric.help, labels=labels)
            for key, histogram in self._histograms[metric].items():
                told.add_metric((self._model_name, *key), histogram.buckets(), histogram.total)
            return told
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        family = kind(name, metric.help, labels=labels)
        for key, value in self._numbers[metric].items():
            family.add_metric((self._model_name, *key), value)
        return family

    def _histogram(self, engine: str, metric: Metric) -> _Histogram:
        series = self._histograms[metric]
        if (engine,) not in series:
            series[engine,] = _Histogram(bounds_of(metric, self._longest))
        return series[engine,]

    def _key(self, engine: str, metric: Metric, labels: Labels) -> Labels:
        key = (engine, *labels)
        series = self._numbers[metric]
        if key in series or len(series) < MAX_SERIES:
            return key
        return (engine, *(OTHER for _ in labels))
