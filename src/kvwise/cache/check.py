"""The proof that nothing leaked: every block and page is accounted for exactly once."""

from collections import Counter

import numpy as np
import numpy.typing as npt

from kvwise.cache.lanes import Lanes, Pages
from kvwise.cache.packing import Packing
from kvwise.cache.paging import Paging
from kvwise.cache.proof import require
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import SequenceTables


def check_conservation(store: BlockStore, tables: SequenceTables, paging: Paging, packing: Packing) -> None:
    """Recompute everything from the tables up and compare; InvariantError at the first difference.

    Cost is O(blocks + pages + rows): for tests and for `EngineConfig.check`, not for every step of a big
    pool.
    """
    _check_states(store)
    _check_references(store, tables, paging)
    _check_pages(store, paging, packing)
    _check_index(store)
    _check_lifecycle(store)
    _check_rows(store, tables, paging)


def _first(bad: npt.NDArray[np.bool_], name: str = "block") -> str:
    return f"{name} {int(np.flatnonzero(bad)[0])}" if bad.any() else "none"


def _check_states(store: BlockStore) -> None:
    """Free, referenced, idle, broken: each block is exactly one of them, and the counts say so."""
    pool = store.pool
    free = np.zeros(pool.num_blocks, np.int64)
    np.add.at(free, pool.free_blocks(), 1)
    referenced = pool.refs > 0
    idle = store.index.keyed & ~referenced
    states = free + referenced + idle + pool.pages.broken + pool.packed.broken
    require(bool((pool.refs >= 0).all()), f"negative reference count: {_first(pool.refs < 0)}")
    require(bool((states == 1).all()), f"not in exactly one state: {_first(states != 1)}")
    require(store.num_idle == int(idle.sum()), f"num_idle {store.num_idle} != {int(idle.sum())}")
    offered = int((idle & ~store.lifecycle.pinned).sum())
    require(len(store.policy) == offered, f"policy ranks {len(store.policy)} blocks, evictable are {offered}")


def _check_references(store: BlockStore, tables: SequenceTables, paging: Paging) -> None:
    """A block's reference count is the number of tables and transfers it stands in; no table names a block twice."""
    counted = store.held.astype(np.int64)
    require(bool((counted >= 0).all()), f"let go more often than held: {_first(counted < 0)}")
    require(store.num_held == int((counted > 0).sum()), f"num_held {store.num_held} != {int((counted > 0).sum())}")
    for row in np.flatnonzero(tables.live).tolist():
        blocks = tables.blocks(row)
        require(len(np.unique(blocks)) == len(blocks), f"row {row} names a block twice")
        held = paging.rows.get(row)
        if held is not None and held.in_place is not None:
            blocks = blocks[~held.in_place]
        counted[blocks] += 1
    wrong = counted != store.pool.refs
    require(not wrong.any(), f"references differ from the tables: {_first(wrong)}")


def _check_pages(store: BlockStore, paging: Paging, packing: Packing) -> None:
    """Of either size, every page has exactly one owner or none; packed pages lie beside open ones."""
    _check_lanes("page", store.pool.pages, [paging.pages_held(row) for row in paging.rows])
    _check_lanes("packed page", store.pool.packed, [table.owned() for table in packing.rows.values()])
    require(packing.rows.keys() <= paging.rows.keys(), "packed pages held by a row without pages")


def _check_lanes(name: str, lanes: Lanes, held: list[Pages]) -> None:
    """Every page marked used has exactly one owner; broken blocks are those with such a page."""
    owners = np.zeros(lanes.page_used.size, np.int64)
    for pages in held:
        np.add.at(owners, pages, 1)
    used = lanes.page_used.reshape(-1)
    require(not (owners > 1).any(), f"{_first(owners > 1, name)} has two owners")
    wrong = used != (owners == 1)
    require(not wrong.any(), f"{_first(wrong, name)}: mark and owner differ")
    per_block = lanes.page_used.sum(axis=1)
    require(bool((per_block == lanes.used).all()), f"used {name}s miscounted: {_first(per_block != lanes.used)}")
    wrong = (per_block > 0) != lanes.broken
    require(not wrong.any(), f"broken without a {name}'s owner: {_first(wrong)}")
    broken, loose = int(lanes.broken.sum()), int((lanes.per_block - lanes.used[lanes.broken]).sum())
    require(lanes.num_broken == broken, f"num_broken {lanes.num_broken} of {name}s != {broken}")
    require(lanes.num_loose == loose, f"num_loose {lanes.num_loose} of {name}s != {loose}")


def _check_index(store: BlockStore) -> None:
    """key -> block and block -> key are inverse, `keyed` mirrors them, probes are counted."""
    index = store.index
    pairs = index.pairs()
    keyed = {block for block in range(store.pool.num_blocks) if index.key(block) is not None}
    require(len(pairs) == len(keyed), f"{len(pairs)} keys for {len(keyed)} keyed blocks")
    for key, block in pairs.items():
        require(index.key(block) == key, f"block {block} is indexed under a key it does not have")
    require(set(np.flatnonzero(index.keyed).tolist()) == keyed, "keyed flags differ from the index")
    of_block, counts = index.probes()
    require(set(of_block) <= keyed, "a probe of an unpublished block")
    require(sum(counts.values()) == len(of_block), "probes miscounted")


def _check_lifecycle(store: BlockStore) -> None:
    """Only published blocks are pinned or expire, no deadline is overlooked, and no tenant is over its quota."""
    life, keyed = store.lifecycle, store.index.keyed
    require(not (life.pinned & ~keyed).any(), f"pinned but not resident: {_first(life.pinned & ~keyed)}")
    require(life.num_pinned == int(life.pinned.sum()), f"num_pinned {life.num_pinned} != {int(life.pinned.sum())}")
    dated = np.isfinite(life.expiry.at)
    require(not (dated & ~keyed).any(), f"expiry of an unpublished block: {_first(dated & ~keyed)}")
    require(not (np.isfinite(life.pins.at) & ~life.pinned).any(), "a pin's deadline without a pin")
    overlooked = life.expiry.num_overlooked() + life.pins.num_overlooked()
    require(not overlooked, f"{overlooked} deadlines that no sweep will find in time")
    _check_quotas(store)


def _check_quotas(store: BlockStore) -> None:
    if not store.quotas.limits:
        return
    offered = store.index.keyed & (store.pool.refs == 0) & ~store.lifecycle.pinned
    ranked = store.quotas.idle()
    keyed = np.flatnonzero(store.index.keyed).tolist()
    used = Counter(store.terms[block].tenant for block in keyed)
    require(store.quotas.used == used, "published blocks of tenants miscounted")
    for tenant, limit in store.quotas.limits.items():
        require(used[tenant] <= limit, f"tenant {tenant!r} keeps {used[tenant]} blocks of at most {limit}")
        own = {block for block in keyed if offered[block] and store.terms[block].tenant == tenant}
        require(ranked[tenant].keys() == own, f"idle blocks of tenant {tenant!r} differ")


def _check_rows(store: BlockStore, tables: SequenceTables, paging: Paging) -> None:
    """Computed tokens fit their blocks; announced keys belong to live rows that will publish them."""
    size_of = tables.capacity
    for row in np.flatnonzero(tables.live).tolist():
        require(int(tables.num_computed[row]) <= int(size_of[row]), f"row {row} computed more than it holds")
    require(all(tables.live[row] for row in paging.rows), "pages held by a released row")
    for key, row in store.index.writers().items():
        keys = tables.keys[row]
        waiting = [] if keys is None or row in paging.rows else keys.chain[int(tables.num_published[row]) :]
        require(bool(tables.live[row]) and key in waiting, f"row {row} announced a key it will not publish")
