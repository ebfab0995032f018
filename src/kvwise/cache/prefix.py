"""The prefix index: which resident block holds which key, and who is about to write which."""

from itertools import takewhile

import numpy as np
import numpy.typing as npt

from kvwise.cache.identity import PrefixKeys


class PrefixIndex:
    """Key <-> block, one block per key and one key per block; `keyed` bool [num_blocks] mirrors it.

    `generation` counts removals, so that whoever holds a run of blocks can tell cheaply that it still stands.
    """

    def __init__(self, num_blocks: int) -> None:
        self.keyed: npt.NDArray[np.bool_] = np.zeros(num_blocks, np.bool_)
        self.generation = 0
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._probe_of: dict[int, bytes] = {}
        self._probes: dict[bytes, int] = {}
        self._writers: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, key: bytes) -> int | None:
        """The block that holds `key`."""
        return self._block_of.get(key)

    def key(self, block: int) -> bytes | None:
        """The key of `block`, if it is published."""
        return self._key_of[block]

    def run(self, chain: list[bytes], limit: int) -> list[int]:
        """Blocks of the longest resident run of `chain[:limit]` from its start."""
        found: list[int | None] = []
        step = 16
        while len(found) < limit:
            part = list(map(self._block_of.get, chain[len(found) : min(len(found) + step, limit)]))
            if None in part:
                found += part[: part.index(None)]
                break
            found += part
            step *= 4  # short at first: most misses are misses at once
        return found  # type: ignore[return-value]  # every None was cut off

    def add(self, keys: list[bytes], blocks: list[int]) -> list[int]:
        """Publish `blocks[i]` under `keys[i]` where neither is taken (the first writer wins); those i.

        The caller mirrors the new ones in `keyed`.
        """
        key_of, claim = self._key_of, self._block_of.setdefault
        added = []
        for i, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if key_of[block] is None and claim(key, block) == block:
                key_of[block] = key
                added.append(i)
        return added

    def add_probe(self, block: int, probe: bytes) -> None:
        """Remember that `block` is the first of a chain with this unsalted `probe`."""
        self._probe_of[block] = probe
        self._probes[probe] = self._probes.get(probe, 0) + 1

    def discard(self, blocks: list[int]) -> list[bytes]:
        """Make published `blocks` unfindable; their keys, in the same order."""
        keys = []
        for block in blocks:
            key = self._key_of[block]
            assert key is not None
            self._key_of[block] = None
            del self._block_of[key]
            keys.append(key)
            if block in self._probe_of:
                self._forget_probe(self._probe_of.pop(block))
        self.keyed[blocks] = False
        self.generation += 1
        return keys

    def stored_under_other_salt(self, keys: PrefixKeys) -> bool:
        """Whether the first block's tokens are resident under some salt (asked when its own key is not)."""
        return keys.probe in self._probes

    def announce(self, keys: list[bytes], row: int) -> None:
        """`row` is going to compute and publish `keys`; a key somebody announced before stays theirs."""
        for key in keys:
            self._writers.setdefault(key, row)

    def retract(self, keys: list[bytes], row: int) -> None:
        """`row` will never publish `keys`."""
        for key in keys:
            if self._writers.get(key) == row:
                del self._writers[key]

    def end_announcements(self, keys: list[bytes]) -> None:
        """`keys` are computed: nobody need wait for them any longer."""
        if self._writers:
            for key in keys:
                self._writers.pop(key, None)

    def num_announced(self, keys: list[bytes]) -> int:
        """How many keys from the start of `keys` some sequence is computing now."""
        return sum(1 for _ in takewhile(self._writers.__contains__, keys))

    def pairs(self) -> dict[bytes, int]:
        """A copy of key -> block, for proofs."""
        return dict(self._block_of)

    def writers(self) -> dict[bytes, int]:
        """A copy of announced key -> row, for proofs."""
        return dict(self._writers)

    def probes(self) -> tuple[dict[int, bytes], dict[bytes, int]]:
        """Copies of first block -> probe and probe -> count, for proofs."""
        return dict(self._probe_of), dict(self._probes)

    def _forget_probe(self, probe: bytes) -> None:
        self._probes[probe] -= 1
        if not self._probes[probe]:
            del self._probes[probe]
