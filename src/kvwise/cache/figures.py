"""Figures of the device pool: what is where, what was evicted, why prompts missed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

import numpy as np
import numpy.typing as npt

from kvwise.cache.ages import AgeFigures
from kvwise.cache.events import Event
from kvwise.cache.identity import PrefixKeys
from kvwise.cache.lookup import num_found
from kvwise.cache.misses import MissReason
from kvwise.cache.occupancy import occupancy
from kvwise.cache.pool import BlockPool
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import SequenceTables
from kvwise.cache.terms import Terms
from kvwise.cache.values import Usage


class Figures:
    """The part of `CacheManager` that only reads."""

    _pool: BlockPool
    _store: BlockStore
    _rows: SequenceTables

    @property
    def num_available(self) -> int:
        """Whole blocks that a reserve could get now: free, or cached and evictable."""
        return self._store.num_available

    @property
    def num_evicted(self) -> int:
        """Blocks evicted since the start."""
        return self._store.num_evicted

    @property
    def miss_counts(self) -> Mapping[MissReason, int]:
        """Admitted requests by what stopped their run of hits."""
        return dict(self._store.ledger.counts)

    def block_ages(self) -> AgeFigures:
        """How old blocks got, lay idle before they were evicted, and were hit again; since the start."""
        return self._store.ages.figures()

    @property
    def num_lost_events(self) -> int:
        """Events that fell out of the full log before anybody drained it."""
        return self._store.events.num_lost

    def drain_events(self) -> list[Event]:
        """Return and forget the logged events, oldest first."""
        return self._store.events.drain()

    def tenant_blocks(self, tenant: str) -> int:
        """Published blocks of the tenant; counted only where there are quotas."""
        return self._store.quotas.used[tenant]

    def stored(self) -> Iterator[tuple[bytes, Terms]]:
        """(key, terms of the sequence that published it) of every published block; valid until the next change."""
        pairs = self._store.index.pairs()
        return ((key, self._store.terms[block]) for key, block in pairs.items())

    def deadlines_of(self, keys: Sequence[bytes]) -> list[float]:
        """When each published block expires if nobody hits it again, in seconds; infinity: never, or not here."""
        found = map(self._store.index.find, keys)
        at = self._store.lifecycle.expiry.at
        return [inf if block is None else float(at[block]) for block in found]

    def terms_of(self, keys: Sequence[bytes]) -> list[Terms | None]:
        """What each published block is kept under, with its own end where it came from a lower tier; None: not here."""
        found = list(map(self._store.index.find, keys))
        ends = self._store.lifecycle.expiry.ends_of(np.array([b for b in found if b is not None], np.int64)).tolist()
        left = iter(ends)
        return [None if block is None else _at_most(self._store.terms[block], next(left)) for block in found]

    def is_stored(self, key: bytes) -> bool:
        """Whether a block is published under `key`, even if it is due to expire."""
        return self._store.index.find(key) is not None

    def num_resident(self, keys: PrefixKeys) -> int:
        """Blocks of the leading run of `keys` that are published and not expired. Changes nothing."""
        return num_found(self._store, keys, len(keys))

    def occupancy(self, soon_s: float = 60.0) -> npt.NDArray[np.uint8]:
        """What holds each block (`occupancy.Holder`), uint8 [num_blocks]; EXPIRING within `soon_s` seconds."""
        return occupancy(self._store, self._store.clock.now() + soon_s)

    def usage(self) -> Usage:
        """Where the blocks and pages are; O(1)."""
        pool, pages, packed = self._pool, self._pool.pages, self._pool.packed
        taken = pool.num_blocks - pool.num_free
        return Usage(
            num_blocks=pool.num_blocks,
            num_free=pool.num_free,
            num_cached=self._store.num_idle,
            num_referenced=taken - self._store.num_idle - pool.num_broken,
            num_broken=pool.num_broken,
            num_pages=pool.num_blocks * pages.per_block,
            num_pages_used=(taken - packed.num_broken) * pages.per_block - pages.num_loose,
            num_pages_loose=pages.num_loose,
            num_packed=pool.num_blocks * packed.per_block,
            num_packed_used=packed.num_used,
            num_packed_loose=packed.num_loose,
            num_pinned=self._store.lifecycle.num_pinned,
            num_sequences=self._rows.num_live,
            num_held=self._store.num_held,
        )


def _at_most(terms: Terms, end: float) -> Terms:
    return terms if terms.expires_at <= end else replace(terms, expires_at=end)
