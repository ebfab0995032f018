"""The host's side of requests: rows opened, given more room and closed, whoever decides which tokens lie there."""

import numpy as np

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.recall_tiers import RecallTiers


class HostPool:
    """Host blocks of one engine, lent to requests. `keep` is for how many steps rows stay that have been fetched."""

    def __init__(self, cache: CacheManager, tiers: RecallTiers, keep: int) -> None:
        self.cache = cache
        self._tiers = tiers
        self._keep = keep
        self._rows: dict[HostRows, int] = {}  # by row of the cache

    def refusal(self, num_tokens: int) -> str | None:
        """Why `num_tokens` tokens of a request can never lie here at once, or None."""
        have = self._tiers.host.num_blocks * self._tiers.layout.block_size
        if num_tokens <= have:
            return None
        return (
            f"need {num_tokens} tokens of host KV and the host tier holds {have}: "
            "raise kv_offloading_bytes, or lower max_tokens"
        )

    def open(self, num_tokens: int) -> HostRows | None:
        """Room for `num_tokens` tokens; None, and nothing held, if there is none."""
        rows = HostRows(self._tiers, self._keep)
        self._rows[rows] = self._admit()
        if self.reserve(rows, num_tokens):
            return rows
        self.close(rows)
        return None

    def _admit(self) -> int:
        keys = self.cache.keys(np.empty(0, dtype=np.int64))
        return self.cache.admit(self.cache.match(keys, 1), keys, 1)

    def reserve(self, rows: HostRows, num_tokens: int) -> bool:
        """Room for `num_tokens` tokens in total; False, and nothing changed, if there is none."""
        layout = self._tiers.layout
        if num_tokens <= len(rows.blocks) * layout.block_size:
            return True
        row = self._rows[rows]
        if not self.cache.reserve(row, num_tokens):
            return False
        rows.blocks = self.cache.tables[row, : layout.num_blocks_for(num_tokens)].astype(np.int64)
        return True

    def shrink(self, rows: HostRows, num_tokens: int) -> None:
        """Room for `num_tokens` tokens only, of rows that have more and hold nothing yet."""
        self.cache.release(self._rows[rows])
        self._rows[rows] = self._admit()
        rows.blocks = rows.blocks[:0]
        held = self.reserve(rows, num_tokens)
        assert held  # less than was given back

    def close(self, rows: HostRows) -> None:
        """Give all back; nothing may be on its way to or from these rows."""
        rows.clear()
        self.cache.release(self._rows.pop(rows))

    @property
    def num_bytes(self) -> int:
        """Host bytes lent."""
        return self.cache.usage().num_referenced * self._tiers.layout.block_bytes
