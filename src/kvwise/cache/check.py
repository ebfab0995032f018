"""The proof that nothing leaked: every block and page is accounted for exactly once."""

import numpy as np
import numpy.typing as npt

from kvwise.cache.paging import Paging
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import SequenceTables
from kvwise.core.errors import InvariantError


def check_conservation(store: BlockStore, tables: SequenceTables, paging: Paging) -> None:
    """Recompute everything from the tables up and compare; InvariantError at the first difference.

    Cost is O(blocks + pages + rows): for tests and for `EngineConfig.check`, not for every step of a big
    pool.
    """
    _check_states(store)
    _check_references(store, tables, paging)
    _check_pages(store, paging)
    _check_index(store)
    _check_lifecycle(store)
    _check_rows(store, tables, paging)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)


def _first(bad: npt.NDArray[np.bool_]) -> str:
    return f"block {int(np.flatnonzero(bad)[0])}" if bad.any() else "none"


def _check_states(store: BlockStore) -> None:
    """Free, referenced, idle, broken: each block is exactly one of them, and the counts say so."""
    pool = store.pool
    free = np.zeros(pool.num_blocks, np.int64)
    np.add.at(free, pool.free_blocks(), 1)
    referenced = pool.refs > 0
    idle = store.index.keyed & ~referenced
    states = free + referenced + idle + pool.broken
    _require(bool((pool.refs >= 0).all()), f"negative reference count: {_first(pool.refs < 0)}")
    _require(bool((states == 1).all()), f"not in exactly one state: {_first(states != 1)}")
    _require(store.num_idle == int(idle.sum()), f"num_idle {store.num_idle} != {int(idle.sum())}")
    _require(pool.num_broken == int(pool.broken.sum()), f"num_broken {pool.num_broken} != {int(pool.broken.sum())}")
    offered = int((idle & ~store.lifecycle.pinned).sum())
    _require(len(store.policy) == offered, f"policy ranks {len(store.policy)} blocks, evictable are {offered}")


def _check_references(store: BlockStore, tables: SequenceTables, paging: Paging) -> None:
    """A block's reference count is the number of tables it stands in, and no table names a block twice."""
    counted = np.zeros(store.pool.num_blocks, np.int64)
    for row in np.flatnonzero(tables.live).tolist():
        blocks = tables.blocks(row)
        _require(len(np.unique(blocks)) == len(blocks), f"row {row} names a block twice")
        held = paging.rows.get(row)
        if held is not None and held.in_place is not None:
            blocks = blocks[~held.in_place]
        counted[blocks] += 1
    wrong = counted != store.pool.refs
    _require(not wrong.any(), f"references differ from the tables: {_first(wrong)}")


def _check_pages(store: BlockStore, paging: Paging) -> None:
    """Every page marked used has exactly one owner; broken blocks are those with such a page."""
    pool = store.pool
    owners = np.zeros(pool.num_blocks * pool.pages_per_block, np.int64)
    for row in paging.rows:
        np.add.at(owners, paging.pages_held(row), 1)
    used = pool.page_used.reshape(-1)
    _require(not (owners > 1).any(), f"page {int(np.argmax(owners))} has two owners")
    _require(
        bool((used == (owners == 1)).all()),
        f"page {int(np.argmax(used != (owners == 1)))}: mark and owner differ",
    )
    per_block = pool.page_used.sum(axis=1)
    _require(bool((per_block == pool.used).all()), f"used pages miscounted: {_first(per_block != pool.used)}")
    _require(
        bool(((per_block > 0) == pool.broken).all()),
        f"broken without owner: {_first((per_block > 0) != pool.broken)}",
    )
    loose = int((pool.pages_per_block - pool.used[pool.broken]).sum())
    _require(pool.num_loose == loose, f"num_loose {pool.num_loose} != {loose}")


def _check_index(store: BlockStore) -> None:
    """key -> block and block -> key are inverse, `keyed` mirrors them, probes are counted."""
    index = store.index
    pairs = index.pairs()
    keyed = {block for block in range(store.pool.num_blocks) if index.key(block) is not None}
    _require(len(pairs) == len(keyed), f"{len(pairs)} keys for {len(keyed)} keyed blocks")
    for key, block in pairs.items():
        _require(index.key(block) == key, f"block {block} is indexed under a key it does not have")
    _require(set(np.flatnonzero(index.keyed).tolist()) == keyed, "keyed flags differ from the index")
    of_block, counts = index.probes()
    _require(set(of_block) <= keyed, "a probe of an unpublished block")
    _require(sum(counts.values()) == len(of_block), "probes miscounted")


def _check_lifecycle(store: BlockStore) -> None:
    """Only published blocks are pinned or expire; nothing is due before `soonest`."""
    life, keyed = store.lifecycle, store.index.keyed
    _require(not (life.pinned & ~keyed).any(), f"pinned but not resident: {_first(life.pinned & ~keyed)}")
    _require(life.num_pinned == int(life.pinned.sum()), f"num_pinned {life.num_pinned} != {int(life.pinned.sum())}")
    dated = np.isfinite(life.expires_at)
    _require(not (dated & ~keyed).any(), f"expiry of an unpublished block: {_first(dated & ~keyed)}")
    _require(not (np.isfinite(life.pinned_until) & ~life.pinned).any(), "a pin's deadline without a pin")
    true = min(life.expires_at.min(initial=np.inf), life.pinned_until.min(initial=np.inf))
    _require(life.soonest <= true, f"a deadline at {true} is earlier than the next one known, {life.soonest}")


def _check_rows(store: BlockStore, tables: SequenceTables, paging: Paging) -> None:
    """Computed tokens fit their blocks; announced keys belong to live rows that will publish them."""
    size_of = tables.capacity
    for row in np.flatnonzero(tables.live).tolist():
        _require(int(tables.num_computed[row]) <= int(size_of[row]), f"row {row} computed more than it holds")
    _require(all(tables.live[row] for row in paging.rows), "pages held by a released row")
    for key, row in store.index.writers().items():
        keys = tables.keys[row]
        waiting = [] if keys is None or row in paging.rows else keys.chain[int(tables.num_published[row]) :]
        _require(bool(tables.live[row]) and key in waiting, f"row {row} announced a key it will not publish")
