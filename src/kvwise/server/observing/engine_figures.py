"""What engines count, as metrics: gauges of now, and counters that go on when a switch replaces an engine."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from kvwise.cache.ages import AgeHistogram
from kvwise.cache.misses import MissReason
from kvwise.engine.hierarchy.tier import TierStats
from kvwise.engine.service import EngineService, EngineSnapshot
from kvwise.server.observing import metric_table as table
from kvwise.server.observing.metric_table import Metric
from kvwise.server.observing.metric_values import Values

DEVICE = "device"
_GAUGES_WITH_LABELS = (
    table.CACHE_CONFIG, table.TIER_BYTES, table.TIER_BLOCKS, table.TIER_HITS, table.TIER_MISSES, table.TIER_UP,
)  # fmt: skip
_Series = tuple[Metric, tuple[str, ...]]


class EngineFigures:
    """Puts the figures of a service's engines into `values`, whenever `update` is called.

    Engines are numbered from 0, the service's default first; one that replaces another has its number and adds to what
    it had counted.
    """

    def __init__(self, service: EngineService, values: Values) -> None:
        self._service = service
        self._values = values
        self._numbers: dict[str, str] = {}  # by strategy
        self._freed: list[str] = []  # numbers of engines that are no more
        self._num_retired = 0
        self._before: dict[str, Counter[_Series]] = {}  # counted by engines that are no more
        self._before_ages: dict[str, list[AgeHistogram]] = {}
        for strategy in service.strategies:
            self._number(strategy)

    def number_of(self, strategy: str) -> str:
        """The number of the engine that serves a strategy; that of the default one if there is none."""
        return self._numbers.get(strategy, "0")

    def update(self) -> None:
        """Read all figures anew."""
        live, retired = self._service.snapshots, self._service.retired
        for snapshot in retired[self._num_retired :]:
            self._retire(snapshot)
        self._num_retired = len(retired)
        for metric in _GAUGES_WITH_LABELS:
            self._values.forget(metric)
        for snapshot in live:
            if not any(snapshot is one for one in retired):  # a switch is under way: it has been counted just now
                self._tell(snapshot)

    def _number(self, strategy: str) -> str:
        if strategy not in self._numbers:
            self._numbers[strategy] = self._freed.pop() if self._freed else str(len(self._numbers))
            self._begin(self._numbers[strategy])
        return self._numbers[strategy]

    def _begin(self, number: str) -> None:
        """Series that are known beforehand are there from the start: a rate needs the 0 before the first event."""
        for metric in table.ENGINE_METRICS:
            if not metric.labels:
                self._values.begin(number, metric)
        for reason in MissReason:
            self._values.begin(number, table.MISSES, _told(reason))

    def _retire(self, snapshot: EngineSnapshot) -> None:
        number = self._number(snapshot.strategy)
        self._before.setdefault(number, Counter()).update(self._counts(snapshot))
        self._before_ages[number] = self._ages(number, snapshot)
        self._freed.append(self._numbers.pop(snapshot.strategy))

    def _tell(self, snapshot: EngineSnapshot) -> None:
        number, stats, values = self._number(snapshot.strategy), snapshot.stats, self._values
        counts = self._counts(snapshot)
        counts.update(self._before.get(number, {}))
        for (metric, labels), count in counts.items():
            values.raise_to(number, metric, count, *labels)
        ages = self._ages(number, snapshot)
        for metric, histogram in zip((table.LIFETIME, table.IDLE, table.GAP), ages, strict=True):
            values.replace(number, metric, histogram.counts, histogram.total_s)
        in_use = stats.blocks_total - stats.blocks_free - stats.blocks_cached
        values.set(number, table.RUNNING, stats.num_running)
        values.set(number, table.WAITING, stats.num_waiting)
        values.set(number, table.USAGE, in_use / stats.blocks_total)
        values.set(number, table.LEAKED, snapshot.num_leaked)
        size = str(self._service.config.block_size)
        values.set(number, table.CACHE_CONFIG, 1, size, str(stats.blocks_total), snapshot.strategy)
        self._tell_tiers(number, snapshot)

    def _tell_tiers(self, number: str, snapshot: EngineSnapshot) -> None:
        stats, values = snapshot.stats, self._values
        for name, num_bytes in stats.kv_bytes.items():
            values.set(number, table.TIER_BYTES, num_bytes, name)
        values.set(number, table.TIER_BLOCKS, stats.blocks_total - stats.blocks_free, DEVICE)
        for tier in _tiers(snapshot):
            values.set(number, table.TIER_BLOCKS, tier.num_blocks, tier.name)
            values.set(number, table.TIER_HITS, tier.hits, tier.name)
            values.set(number, table.TIER_MISSES, tier.misses, tier.name)
            values.set(number, table.TIER_UP, tier.breaker == "closed", tier.name)

    def _counts(self, snapshot: EngineSnapshot) -> Counter[_Series]:
        """What one engine has counted since its own start."""
        stats, moved, tiers = snapshot.stats, snapshot.moved, _tiers(snapshot)
        found = sum(tier.hits for tier in tiers) * self._service.config.block_size
        counts = Counter[_Series]({
            (table.PREFIX_QUERIES, ()): stats.prefix_queries,
            (table.PREFIX_HITS, ()): stats.prefix_hits,
            (table.EXTERNAL_QUERIES, ()): stats.prefix_queries - stats.prefix_hits if tiers else 0,
            (table.EXTERNAL_HITS, ()): found,
            (table.PREEMPTIONS, ()): stats.num_preemptions,
            (table.LOADED_BYTES, ()): sum(one.loaded for one in moved.values()),
            (table.STORED_BYTES, ()): sum(one.stored for one in moved.values()),
            (table.EVICTED, ()): snapshot.num_evicted,
        })  # fmt: skip
        for reason, count in snapshot.misses.items():
            counts[table.MISSES, (_told(reason),)] += count
        for name, one in moved.items():
            counts[table.TIER_LOADED, (name,)] = one.loaded
            counts[table.TIER_STORED, (name,)] = one.stored
        for tier in tiers:
            for kind, count in tier.num_faults.items():
                counts[table.TIER_FAULTS, (tier.name, kind)] = count
        return counts

    def _ages(self, number: str, snapshot: EngineSnapshot) -> list[AgeHistogram]:
        before = self._before_ages.get(number)
        return list(snapshot.ages) if before is None else list(map(_sum, before, snapshot.ages))


def _told(reason: str) -> str:
    """A reason as anybody may read it: that another salt's blocks were met must not be seen from outside.

    Whoever can read the page could try prompts and watch the count, to learn what other tenants have stored.
    """
    return str(MissReason.NEVER_STORED if reason == MissReason.OTHER_SALT else reason)


def _tiers(snapshot: EngineSnapshot) -> Sequence[TierStats]:
    return list(_only_tiers(snapshot.stats.tiers))


def _only_tiers(tiers: Mapping[str, object]) -> Iterator[TierStats]:
    return (tier for tier in tiers.values() if isinstance(tier, TierStats))


def _sum(one: AgeHistogram, other: AgeHistogram) -> AgeHistogram:
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return AgeHistogram(counts, one.total_s + other.total_s)
