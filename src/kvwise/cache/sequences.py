"""The life of rows that hold whole blocks: open, reserve, commit, fork, close."""

import numpy as np
import numpy.typing as npt

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.store import BlockStore, Publication
from kvwise.cache.tables import UNBOUNDED, Floats, SequenceTables
from kvwise.cache.terms import Terms
from kvwise.cache.values import Match, Move
from kvwise.core.errors import CapacityError, InvariantError

Int64 = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Sequences:
    """Carries out what `CacheManager` documents, on the rows of `tables` and the blocks of `store`."""

    def __init__(self, store: BlockStore, tables: SequenceTables, block_size: int) -> None:
        self._store = store
        self._tables = tables
        self._block_size = block_size

    def open(self, match: Match, keys: PrefixKeys, *, publishing: bool, terms: Terms) -> int:
        """A row that holds the matched blocks; it announces the rest of `keys` if `publishing`."""
        table = self._tables
        row = table.take()
        count = len(match.blocks)
        self._store.retain(match.blocks)
        table.tables[row, :count] = match.blocks
        table.num_blocks[row] = table.num_published[row] = count
        table.num_computed[row] = table.capacity[row] = match.num_tokens
        table.set_terms(row, terms)
        table.set_keys(row, keys.copy(), self._block_size)
        if publishing:
            table.publish_at[row] = match.num_tokens + self._block_size
            self._store.index.announce(keys.chain[count:], row)
        return row

    def reserve(self, rows: Ints, num_tokens: Ints) -> Bools:
        """See `CacheManager.reserve_many`."""
        short = num_tokens > self._tables.capacity[rows]
        granted: Bools = ~short
        where = np.flatnonzero(short)
        if not len(where):
            return granted
        late = rows[where]
        held = self._tables.num_blocks[late].astype(np.int64)
        need = -(-num_tokens[where] // self._block_size) - held
        self._require_columns(late, held + need)
        if int(need.sum()) > self._store.num_available:
            fits = _greedy(need, self._store.num_available)
            where, late, need = where[fits], late[fits], need[fits]
        if len(where):
            self._append_blocks(late, need)
        granted[where] = True
        return granted

    def commit(self, rows: Ints, num_tokens: Ints) -> None:
        """See `CacheManager.commit`."""
        table = self._tables
        bad = (num_tokens > table.capacity[rows]) | (num_tokens < table.num_computed[rows])
        if bad.any():
            self._refuse_commit(int(rows[bad][0]), int(num_tokens[bad][0]))
        table.num_computed[rows] = num_tokens
        due = rows[num_tokens >= table.publish_at[rows]]
        if len(due):
            self._publish(due)

    def fork(self, row: int) -> tuple[int, list[Move]]:
        """See `CacheManager.fork`."""
        table = self._tables
        full, rest = divmod(int(table.num_computed[row]), self._block_size)
        if rest and not self._store.num_available:
            raise CapacityError("no block is free for the fork's last block: release or preempt a sequence first")
        twin = table.take()
        shared = table.blocks(row)[:full]
        self._store.pool.refs[shared] += 1
        table.tables[twin, :full] = shared
        for column in (table.num_computed, table.num_published, table.publish_at, table.expires_at, table.idle_s):
            column[twin] = column[row]
        table.terms[twin] = table.terms[row]
        if row in table.limits:
            table.limits[twin] = table.limits[row]
        table.num_blocks[twin] = full
        table.capacity[twin] = full * self._block_size
        table.set_keys(twin, table.chain(row).copy(), self._block_size)
        if not rest:
            return twin, []
        self._append_blocks(np.array([twin]), np.array([1]))
        return twin, [Move(int(table.tables[row, full]), int(table.tables[twin, full]))]

    def retract(self, row: int) -> None:
        """The row will publish nothing more: nobody need wait for what it announced."""
        if self._tables.publish_at[row] < UNBOUNDED:
            waiting = self._tables.chain(row).chain[int(self._tables.num_published[row]) :]
            self._store.index.retract(waiting, row)
            self._tables.publish_at[row] = UNBOUNDED

    def close(self, row: int) -> None:
        """Drop the row's references and the row."""
        self.retract(row)
        self._store.let_go(self._tables.blocks(row))
        self._tables.give_back(row)

    def _publish(self, due: Ints) -> None:
        """Publish the blocks of the rows `due` that are full and keyed by now."""
        table = self._tables
        start = table.num_published[due]
        stop = np.minimum(table.num_computed[due], table.num_keyed[due]) // self._block_size
        table.num_published[due] = stop
        table.publish_at[due] = (stop + 1) * self._block_size
        keys: list[bytes] = []
        parents: list[bytes] = []
        probes: dict[int, bytes] = {}
        for row, first, last in zip(due.tolist(), start.tolist(), stop.tolist(), strict=True):
            source = table.chain(row)
            keys += source.chain[first:last]
            if first:
                parents += source.chain[first - 1 : last - 1]
            elif last:
                parents += [source.root, *source.chain[: last - 1]]
                probes[int(table.tables[row, 0])] = source.probe
        if keys:
            row_of, depths = _spread(due, start, stop - start)
            blocks = table.tables[row_of, depths].astype(np.int64)
            dates = self._dates(row_of, depths) if table.dated else None
            terms = [table.terms[row] for row in row_of.tolist()]
            self._store.publish(Publication(keys, parents, blocks, depths, probes, dates, terms))

    def _dates(self, rows: Ints, depths: Int64) -> Floats:
        """Ends and idle times [2, n] of the blocks at (row, depth), seconds."""
        table, own = self._tables, self._tables.limits
        ends = table.expires_at[rows]
        if own:
            pairs = zip(rows.tolist(), depths.tolist(), strict=True)
            limits = [own[row][i] if row in own and i < len(own[row]) else np.inf for row, i in pairs]
            ends = np.minimum(ends, limits)
        return np.stack([ends, table.idle_s[rows]])

    def _append_blocks(self, rows: Ints, need: Int64) -> None:
        """Give each of `rows` `need` (>= 1) more blocks; there is room for them."""
        total = int(need.sum())
        blocks = self._store.take(total)
        self._store.pool.refs[blocks] = 1
        held = self._tables.num_blocks[rows].astype(np.int64)
        self._tables.tables[_spread(rows, held, need)] = blocks
        self._tables.num_blocks[rows] = held + need
        self._tables.capacity[rows] = (held + need) * self._block_size

    def _require_columns(self, rows: Ints, wanted: Ints) -> None:
        for row in rows[~self._tables.live[rows]].tolist():
            self._tables.require_live(row)
        most, limit = int(wanted.max()), self._tables.max_blocks
        if most > limit:
            raise CapacityError(
                f"a sequence of {most} blocks is longer than a table of {limit} blocks "
                f"({limit * self._block_size} tokens): shorten the request or raise max_model_len"
            )

    def _refuse_commit(self, row: int, count: int) -> None:
        table = self._tables
        raise InvariantError(
            f"commit of {count} tokens to row {row}, with {table.num_computed[row]} computed and room for "
            f"{table.capacity[row]}: reserve before commit, and never take tokens back"
        )


def _spread(rows: Ints, start: Int64, count: Int64) -> tuple[Ints, Int64]:
    """Table places (row, column): columns `start[i], start[i] + 1, ...`, `count[i]` of them, for every row i."""
    if count.max() == 1 == count.min():
        return rows, start  # one place a row: the decode step
    ends = np.cumsum(count)
    columns: Int64 = np.arange(int(ends[-1])) + np.repeat(start - ends + count, count)
    repeated: Int64 = np.repeat(rows, count).astype(np.int64)
    return repeated, columns


def _greedy(need: Ints, available: int) -> Bools:
    """Which demands are met, in order, out of `available`."""
    fits = np.zeros(len(need), np.bool_)
    for i, count in enumerate(need.tolist()):
        if count <= available:
            available -= count
            fits[i] = True
    return fits
