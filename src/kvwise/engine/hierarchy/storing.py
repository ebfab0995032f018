"""Which blocks of running requests go down to the tiers, and when."""

from collections.abc import Sequence

from kvwise.cache.manager import CacheManager
from kvwise.core.config import EngineConfig
from kvwise.engine.hierarchy.hierarchy import Hierarchy, Offer
from kvwise.engine.sequence import Sequence as Seq


class Storing:
    """Offers full blocks to the hierarchy: as soon as they are full (`offload="through"`), or when their request ends.

    A block is held while its bytes are read in the background, so a step never waits for a tier; what would hold too
    much of the pool at a time is skipped.
    """

    def __init__(self, hierarchy: Hierarchy, cache: CacheManager, config: EngineConfig) -> None:
        self._hierarchy = hierarchy
        self._cache = cache
        self._size = cache.block_size
        self._at_once = config.offload == "through"
        self._min_tokens = config.store_min_tokens

    def poll(self) -> None:
        """Give back blocks that are written, carry out what is due in the tiers and on the device."""
        self._hierarchy.poll()

    def offer_full(self, sequences: Sequence[Seq]) -> None:
        """The KV of these sequences has grown, or they were admitted. What finds no room now is offered again."""
        if self._at_once:
            for sequence in sequences:
                self._offer(sequence, last_call=False)

    def offer_rest(self, sequence: Seq) -> None:
        """The sequence is about to let go of its blocks."""
        self._offer(sequence, last_call=True)

    def _offer(self, sequence: Seq, *, last_call: bool) -> None:
        if sequence.row is None or sequence.settled or sequence.num_prompt < self._min_tokens:
            return
        # What is committed, which is less than what was computed where a step went wrong.
        full, first = int(self._cache.num_computed[sequence.row]) // self._size, sequence.num_offered
        if full <= first:
            return
        chain = self._cache.chain(sequence.row)
        if self._cache.holds_pages(sequence.row) or chain.private:
            return
        keys = chain.chain[first:full]
        if not keys:
            return
        most = self._hierarchy.num_room
        if not last_call and not most:
            return
        wanted = self._hierarchy.wanted(keys if last_call else keys[:most])
        # Under the terms of whoever stored them first. What a purge took from the device, though the request still uses
        # it, goes no further down.
        terms = self._cache.terms_of(keys[: len(wanted)])
        wanted = [one and kept is not None for one, kept in zip(wanted, terms, strict=True)]
        sequence.num_offered = first + len(wanted)
        for start, stop in _runs(wanted):
            room = self._hierarchy.num_last_room if last_call else self._hierarchy.num_room
            end = min(stop, start + room)
            self._hierarchy.num_skipped += stop - end
            if start < end:
                blocks = self._cache.hold(sequence.row, first + start, first + end)
                parents = [chain.chain[i - 1] if i else chain.root for i in range(first + start, first + end)]
                self._hierarchy.save(
                    Offer(keys[start:end], parents, first + start, blocks, chain.bare_probe),
                    [kept for kept in terms[start:end] if kept is not None],
                )


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, stop) of each run of true flags."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))
