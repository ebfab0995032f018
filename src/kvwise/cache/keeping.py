"""What outlasts one call: holds of transfers, pins, deadlines, and the ways published blocks leave on demand."""

from collections.abc import Iterable, Sequence

import numpy as np

from kvwise.cache.deadlines import Floats
from kvwise.cache.identity import PrefixKeys
from kvwise.cache.misses import RemovalReason
from kvwise.cache.paging import Paging
from kvwise.cache.sequences import Sequences
from kvwise.cache.store import BlockStore
from kvwise.cache.tables import SequenceTables
from kvwise.cache.values import Withdrawn
from kvwise.core.clock import Clock
from kvwise.core.errors import UsageError
from kvwise.policies.base import Blocks


class Keeping:
    """The part of `CacheManager` about how long blocks are kept, and by whom."""

    clock: Clock
    _store: BlockStore
    _rows: SequenceTables
    _sequences: Sequences
    _paging: Paging

    # -- transfers ---------------------------------------------------------------------------------

    def hold(self, row: int, start: int, stop: int) -> Blocks:
        """Keep the row's blocks [start, stop) for a transfer under way; int64 [stop - start].

        They are nobody else's until `let_go`, also if the row is released before. UsageError if the row holds pages,
        or has not so many blocks.
        """
        self._rows.require_live(row)
        if row in self._paging.rows:
            raise UsageError(f"row {row} holds pages of its own, which no transfer can hold")
        count = int(self._rows.num_blocks[row])
        if not 0 <= start <= stop <= count:
            raise UsageError(f"blocks [{start}, {stop}) of row {row}, which has {count}: reserve before hold")
        blocks = self._rows.blocks(row)[start:stop]
        self._store.hold(blocks)
        return blocks

    def let_go(self, blocks: Blocks) -> None:
        """The transfer of `blocks`, as `hold` or `withdraw` returned them, is over: exactly once for each.

        Blocks of no row are free then, or stay findable if they were published meanwhile. InvariantError if they are
        not held.
        """
        self._store.end_hold(blocks)

    def set_expiry(self, row: int, start: int, expires_at: Floats) -> None:
        """The row's block `start + i` must not outlive `expires_at[i]` seconds, once it is published.

        For blocks that came from a lower tier and keep the rest of their time. Of two deadlines the earlier holds,
        that of the row's own terms too.
        """
        self._rows.require_live(row)
        self._rows.limit(row, start, expires_at)

    def keep_private(self, row: int) -> None:
        """The row publishes nothing from now on; nobody waits for what it announced."""
        self._rows.require_live(row)
        self._sequences.retract(row)

    # -- pins and deadlines ------------------------------------------------------------------------

    def pin(self, keys: PrefixKeys, until: float | None = None) -> int:
        """Keep the resident run of `keys` from eviction until `until` seconds (None: until `unpin`).

        Returns the number of blocks pinned. Of two pins the later deadline holds; expiry ends a pin.
        """
        blocks = self._resident(keys)
        self._store.pin(blocks, np.inf if until is None else until)
        return len(blocks)

    def unpin(self, keys: PrefixKeys) -> int:
        """End the pins of the resident run of `keys`, whoever set them; the number of pins ended."""
        return self._store.unpin(self._resident(keys))

    def expire(self, now: float | None = None) -> int:
        """Carry out what is due at `now` (None: the clock's): expiry, ends of pins. Number expired."""
        return self._store.sweep(self.clock.now() if now is None else now)

    # -- leaving on demand -------------------------------------------------------------------------

    def withdraw(self, keys: Sequence[bytes], reason: RemovalReason) -> Withdrawn:
        """Make those of `keys` that are resident unfindable, pinned ones too, for `reason`.

        Blocks nobody refers to come back held: overwrite their bytes, then `let_go` frees them.
        """
        found = map(self._store.index.find, dict.fromkeys(keys))
        return self._store.withdraw_held(np.array([block for block in found if block is not None], np.int64), reason)

    def clear(self) -> int:
        """Make everything unfindable; live sequences keep their blocks, private now. Number unpublished."""
        return self._store.clear()

    def note_foreign(self, bare_probes: Iterable[bytes]) -> None:
        """Prompts that lower tiers keep under another model, dtype or version, for the reason of a miss.

        Each is `PrefixKeys.bare_probe`, of the first block's tokens alone.
        """
        self._store.foreign.update(bare_probes)

    def _resident(self, keys: PrefixKeys) -> Blocks:
        return np.array(self._store.index.run(keys.chain, len(keys)), np.int64)
