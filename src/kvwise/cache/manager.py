"""CacheManager: the only face of the cache. Match, reserve, commit, release; decisions over ids, no bytes."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvwise.cache.check import check_conservation
from kvwise.cache.figures import Figures
from kvwise.cache.identity import Content, Identity, PrefixKeys, Tokens
from kvwise.cache.keeping import Keeping
from kvwise.cache.lookup import find_match, no_match, stands
from kvwise.cache.packing import Packing
from kvwise.cache.paging import Paging
from kvwise.cache.pool import BlockPool
from kvwise.cache.sequences import Sequences
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import UNBOUNDED, SequenceTables
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.cache.values import Match, Move, Usage, Withdrawn
from kvwise.core.clock import Clock
from kvwise.core.errors import CapacityError, InvariantError, UsageError
from kvwise.policies.base import ReplacementPolicy

__all__ = ["CacheManager", "Identity", "Match", "Move", "PrefixKeys", "Terms", "Usage", "Withdrawn"]

Int32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class CacheManager(Keeping, Figures):
    """Owns the block ids and page ids of one tier; sequences are rows of arrays, named by number.

    Life of a row: `keys` -> `match` -> `admit` -> (`reserve` -> `commit`)* -> `release`. How long blocks are kept is
    said in `keeping.Keeping`, figures are in `figures.Figures`, which are parts of this class. A preempted request
    is released and admitted again later: what it published is matched then. A block is matchable from the
    commit that fills it, never before. The engine reads `tables` int32 [max_sequences,
    max_blocks_per_sequence], `num_blocks` and `num_computed` int32 [max_sequences], and never writes them.
    `packed_per_block`: packed pages that fit a block, 0 for none.
    Not thread-safe: one engine loop owns it.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        pages_per_block: int,
        block_size: int,
        max_sequences: int,
        max_blocks_per_sequence: int,
        sharing: bool,
        identity: Identity,
        policy: ReplacementPolicy,
        clock: Clock,
        max_event_blocks: int = 10_000,
        quotas: Mapping[str, int] | None = None,
        packed_per_block: int = 0,
    ) -> None:
        sizes = (num_blocks, pages_per_block, block_size, max_sequences, max_blocks_per_sequence)
        if min(sizes) < 1:
            raise UsageError(f"blocks, pages a block, block size, rows, table length = {sizes}: each must be >= 1")
        if packed_per_block < 0:
            raise UsageError(f"packed_per_block is {packed_per_block}: it must be >= 0, and 0 for no packed pages")
        if num_blocks * (most := max(pages_per_block, packed_per_block)) > UNBOUNDED:
            raise UsageError(f"{num_blocks} blocks of {most} pages exceed int32: use a smaller pool")
        if identity.block_size != block_size:
            raise UsageError(f"block size {block_size}, but the identity says {identity.block_size}: make them equal")
        self.block_size = block_size
        self.sharing = sharing
        self.identity = identity
        self.policy = policy
        self.clock = clock
        self.num_prefix_queries = 0  # tokens looked up by admitted requests
        self.num_prefix_hits = 0  # tokens found
        self._pool = BlockPool(num_blocks, pages_per_block, packed_per_block)
        self._store = BlockStore(self._pool, policy, clock, max_event_blocks, quotas or {})
        self._rows = SequenceTables(max_sequences, max_blocks_per_sequence)
        self._sequences = Sequences(self._store, self._rows, block_size)
        self._paging = Paging(self._store, self._rows)
        self._packing = Packing(self._store, self._paging)
        self._unsalted_root = identity.root()
        self.tables = self._rows.tables
        self.num_blocks = self._rows.num_blocks
        self.num_computed = self._rows.num_computed

    # -- look-up -----------------------------------------------------------------------------------

    def keys(
        self, tokens: Tokens, salt: str | None = "", content: tuple[Content, ...] = (), *, limit: int | None = None
    ) -> PrefixKeys:
        """Chain keys of the full blocks of `tokens` [T], once per request; no keys if sharing is off.

        `salt` None: the prompt is private, it neither hits nor publishes. `content` names the images behind tokens.
        Not more than the first `limit` blocks have keys, now or when the sequence grows.
        """
        root = self.identity.root(salt) if salt else self._unsalted_root
        keys = PrefixKeys(root, self._unsalted_root, private=salt is None, content=content, limit=limit)
        if self.sharing and not keys.private:
            keys.extend(tokens, self.block_size)
        return keys

    def match(self, keys: PrefixKeys, num_tokens: int, num_last: int = 1) -> Match:
        """Longest resident run of a prompt of `num_tokens` tokens; at least `num_last` >= 1 are left to compute.

        More than one where a method must see the attention rows of the prompt's last tokens. A run that goes as far
        as that allows ends at a block boundary, whatever is resident beyond it. Only looks: holds nothing until
        `admit`, which must follow before the manager evicts or expires anything.
        """
        if num_last < 1:
            raise UsageError(f"num_last is {num_last}: at least 1 token must be left to compute")
        if keys.private or not self.sharing:
            return no_match(self._store)
        return find_match(self._store, keys, max(num_tokens - num_last + 1, 1), self.block_size)

    # -- life of a sequence ------------------------------------------------------------------------

    def admit(self, match: Match, keys: PrefixKeys, num_tokens: int, *, terms: Terms = NO_LIMIT) -> int:
        """Open a row that holds the matched blocks; `num_tokens` is the prompt's length, as given to `match`.

        What the row publishes is kept under `terms`. Raises CapacityError if all rows are taken, InvariantError if a
        matched block has left since the match.
        """
        row = self._open(match, keys, terms)
        self._count(match, num_tokens)
        return row

    def admit_with_room(
        self, match: Match, keys: PrefixKeys, num_tokens: int, *, terms: Terms = NO_LIMIT
    ) -> int | None:
        """As `admit`, with room for all `num_tokens` tokens; None, and nothing held or counted, if there is none."""
        row = self._open(match, keys, terms)
        if not self.reserve(row, num_tokens):
            self.release(row)
            return None
        self._count(match, num_tokens)
        return row

    def _open(self, match: Match, keys: PrefixKeys, terms: Terms) -> int:
        if not stands(self._store, match, keys):
            raise InvariantError("a matched block left between match and admit: match again right before admit")
        return self._sequences.open(match, keys, publishing=self.sharing and not keys.private, terms=terms)

    def _count(self, match: Match, num_tokens: int) -> None:
        if self.sharing:
            self.num_prefix_queries += num_tokens
            self.num_prefix_hits += match.num_tokens
        self._store.ledger.counts[match.miss.reason] += 1

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in total; False, and nothing changed, if there is none."""
        return bool(self._sequences.reserve(np.array([row]), np.array([num_tokens]))[0])

    def reserve_many(self, rows: Ints, num_tokens: Ints) -> Bools:
        """Make room for `num_tokens[i]` tokens in total in each of the distinct `rows`; bool [n].

        All or nothing per row, earlier rows first; a later row may still succeed with less. Evicts
        unreferenced blocks by the policy, never a referenced one. Rows that hold pages always succeed: they
        grow by `grow_pages`. CapacityError if a row's table is too short, InvariantError if a row is not
        live.
        """
        return self._sequences.reserve(rows, num_tokens)

    def keyless(self, rows: Ints, num_tokens: Ints) -> Ints:
        """Indices into `rows` of those that fill a block without a key when `num_tokens` are committed.

        In decode that is one row in `block_size` per step. Give each its tokens by `extend_keys` before
        `commit`, else those blocks stay private until the commit that follows it.
        """
        due = np.flatnonzero(num_tokens >= self._rows.publish_at[rows])
        return due[num_tokens[due] >= self._rows.num_keyed[rows[due]] + self.block_size]

    def chain(self, row: int) -> PrefixKeys:
        """The row's keys, to be read only."""
        return self._rows.chain(row)

    def num_keyed(self, row: int) -> int:
        """Tokens of the row whose blocks have keys; `extend_keys` goes on from there."""
        return int(self._rows.num_keyed[row])

    def extend_keys(self, row: int, tokens: Tokens) -> None:
        """Append the keys of the full blocks in `tokens` [T], the row's tokens from `num_keyed` on."""
        keys = self._rows.chain(row)
        if self.sharing and not keys.private:
            keys.extend(tokens, self.block_size)
            self._rows.num_keyed[row] = len(keys) * self.block_size

    def commit(self, rows: Ints, num_tokens: Ints) -> None:
        """The bytes of the first `num_tokens[i]` tokens of each of the distinct `rows` are written.

        Blocks that are full by now and have a key become matchable; if another block has that key already,
        the row keeps its own copy private. InvariantError if a row lacks the room, or computed more already.
        """
        self._sequences.commit(rows, num_tokens)

    def release(self, row: int) -> None:
        """Close the row: what it published stays matchable, its other blocks and pages are free."""
        self._rows.require_live(row)
        if row in self._paging.rows:
            self._packing.release(row)
            self._paging.release(row)
        self._sequences.close(row)

    def fork(self, row: int) -> tuple[int, list[Move]]:
        """A second row with the same tokens: full blocks are shared, a partly filled one is copied (Move).

        CapacityError, and nothing changed, if no row or block is free; UsageError if the row holds pages.
        """
        self._rows.require_live(row)
        if row in self._paging.rows:
            raise UsageError(f"row {row} holds pages of its own, which cannot be shared: fork before paginate")
        return self._sequences.fork(row)

    # -- pages -------------------------------------------------------------------------------------

    def paginate(self, row: int, num_pages: Ints) -> Int32 | None:
        """Give the row `num_pages` [L, H] pages per head -> page tables int32 [L, H, max(num_pages)].

        Page i of (l, h) is that of the row's block i where the row alone holds that block unpublished;
        elsewhere it is a fresh page: what others may hit is not rewritten (copy-on-evict). Only for lack of
        room are own published blocks withdrawn and reused. None, and nothing changed, if even that is not
        enough. The old block table stays readable until `finish_paginate`; from now on the row publishes
        nothing.
        """
        self._rows.require_live(row)
        table = self._paging.paginate(row, num_pages)
        if table is not None:
            self._sequences.retract(row)
        return table

    def finish_paginate(self, row: int) -> None:
        """The bytes are moved: free every page outside the row's page table, drop its shared blocks."""
        self._paging.finish(row)

    def grow_pages(self, row: int, num_pages: Ints) -> Int32 | None:
        """Enlarge the row's page tables to `num_pages` [L, H]; None, and nothing changed, if no room."""
        return self._paging.grow(row, num_pages)

    def trim_pages(self, row: int, num_pages: Ints) -> Int32:
        """Free the last pages of the row's tables down to `num_pages` [L, H]; the tables."""
        return self._paging.trim(row, num_pages)

    def shift_pages(self, row: int, num_dropped: Ints, num_pages: Ints) -> Int32 | None:
        """Drop the first `num_dropped` [L, H] pages of each head, then grow or trim at the end to `num_pages` in total.

        The tables int32 [L, H, max(num_pages)], a page that is dropped may serve as one that is added; None, and
        nothing changed, if there is no room.
        """
        return self._paging.shift(row, num_dropped, num_pages)

    def page_table(self, row: int) -> tuple[Int32, Int32]:
        """(page tables int32 [L, H, N], counts int32 [L, H]) of a row that holds pages."""
        table = self._paging.require(row).table
        return table.pages, table.counts

    def holds_pages(self, row: int) -> bool:
        """Whether the row has left its block table."""
        return row in self._paging.rows

    # -- packed pages ------------------------------------------------------------------------------

    def grow_packed(self, row: int, num_pages: Ints) -> Int32 | None:
        """Give the row `num_pages` [L, H] packed pages in total -> tables int32 [L, H, M]; None, and nothing
        changed, if no room.

        For a row that holds pages, from `paginate` on: before `finish_paginate` the old block table is still readable,
        so its tokens can be packed from there. UsageError if the row has more, or the pool no packed pages.
        """
        return self._packing.grow(row, num_pages)

    def drop_packed(self, row: int, gone: Bools) -> Int32:
        """Free the packed pages that are `gone`, bool [L, H, M], and close the gaps in order; the tables.

        M becomes the largest count left. UsageError if `gone` names an entry beyond the row's counts.
        """
        return self._packing.drop(row, gone)

    def packed_table(self, row: int) -> tuple[Int32, Int32]:
        """(packed tables int32 [L, H, M], counts int32 [L, H]) of a row that holds pages; M is 0 until it grows."""
        table = self._packing.table(row)
        return table.pages, table.counts

    # -- checks -----------------------------------------------------------------------------------

    @property
    def most_tokens(self) -> int:
        """Tokens that a sequence in whole blocks could have if it ran alone."""
        return min(self._pool.num_blocks, self._rows.max_blocks) * self.block_size

    def require_fits(self, num_tokens: int) -> None:
        """CapacityError if a sequence of `num_tokens` tokens could not run even alone."""
        need, limit = -(-num_tokens // self.block_size), self.most_tokens // self.block_size
        if need > limit:
            raise CapacityError(
                f"{num_tokens} tokens need {need} blocks, but a sequence can have at most {limit} "
                f"({limit * self.block_size} tokens): shorten the request, or raise kv_cache_memory_bytes "
                "or max_model_len"
            )

    def check(self) -> None:
        """Prove that every block and page is accounted for exactly once, else InvariantError."""
        check_conservation(self._store, self._rows, self._paging, self._packing)
