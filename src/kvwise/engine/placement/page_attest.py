"""What the methods did to a request that has settled, for its attestation."""

from kvwise.cache.manager import CacheManager
from kvwise.engine.placement.page_state import Counts, PageState
from kvwise.engine.placement.sealing import Sealer
from kvwise.engine.sequence import Sequence as Seq
from kvwise.methods.encoding.base import Encoding
from kvwise.methods.retention.base import Kept, Retention
from kvwise.tiers.arena import Arena


class PageAttester:
    """Writes down what stayed, what became of the rest, and what it takes. `demotes`: who leaves goes to the host."""

    def __init__(
        self, retention: Retention, encoding: Encoding, cache: CacheManager, arena: Arena, state: PageState,
        sealer: Sealer | None, *, demotes: bool,
    ) -> None:  # fmt: skip
        self._retention = retention
        self._encoding = encoding
        self._cache = cache
        self._arena = arena
        self._state = state
        self._sealer = sealer
        self._demotes = demotes

    def kept(self, sequence: Seq, kept: Kept, counts: Counts) -> None:
        """A method has said what stays: `counts` [L, H] tokens."""
        told, name = sequence.attestation, self._retention.name
        gone = sequence.num_computed * counts.size - int(counts.sum())
        merged = 0
        if kept.merge is not None:
            lives_on = (kept.merge.key_weights != 0) | (kept.merge.value_weights != 0)
            merged = int((lives_on & ~kept.mask).sum())
        told.tokens_merged += merged
        if not self._demotes:
            told.tokens_dropped += gone - merged
        else:
            told.tokens_demoted += gone
        if self._retention.drops:
            told.did[name] = told.did.get(name, 0) + gone

    def settled(self, sequence: Seq, row: int) -> None:
        """What stays lies in its pages, packed as far as it is due."""
        layout, told = self._arena.layout, sequence.attestation
        before = layout.num_blocks_for(sequence.num_computed) * layout.block_bytes
        told.bytes_freed += max(0, before - self._bytes_of(row))
        told.bits_per_element = self.bits_per_element(sequence)
        if self._sealer is not None:
            name = self._encoding.name
            told.did[name] = told.did.get(name, 0) + int(self._state.key_length[row].sum())

    def _bytes_of(self, row: int) -> int:
        num_bytes = int(self._cache.page_table(row)[1].sum()) * self._arena.layout.page_bytes
        if self._sealer is not None:
            num_bytes += int(self._cache.packed_table(row)[1].sum()) * self._sealer.packed.format.page_bytes
        return num_bytes

    def bits_per_element(self, sequence: Seq) -> float:
        """Bits that a number of K or V takes now, on average of the tokens held; half-filled pages are not counted."""
        layout, row = self._arena.layout, sequence.row
        assert row is not None
        native = 8.0 * layout.element_bytes
        if self._sealer is None:
            return native
        packed = float(self._state.key_length[row].sum() + self._state.value_length[row].sum()) / 2
        share = packed / float(self._state.used[row].sum())
        return share * self._sealer.packed.format.bits_per_element + (1 - share) * native
