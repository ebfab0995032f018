"""Sequences as rows of preallocated arrays: block tables, lengths, next token count of interest."""

import numpy as np
import numpy.typing as npt

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.core.errors import CapacityError, InvariantError
from kvwise.policies.base import Blocks

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
UNBOUNDED = int(np.iinfo(np.int32).max)


class SequenceTables:
    """One row per live sequence; a free row's entries are meaningless.

    `tables` int32 [S, N]; `num_blocks`, `num_computed` int32 [S]; `capacity` int64 [S]: tokens that fit the
    row's blocks (UNBOUNDED for rows that hold pages); `publish_at` int64 [S]: tokens at which the next block
    may be published (UNBOUNDED: never); `num_published` int64 [S]: leading blocks already considered for
    publishing; `num_keyed` int64 [S]: tokens whose blocks have keys; `expires_at`, `idle_s` float64 [S]: the terms of
    what the row publishes; `limits` row -> float64 [n]: deadlines of its first n blocks, where they have their own.
    """

    def __init__(self, max_sequences: int, max_blocks: int) -> None:
        self.max_sequences = max_sequences
        self.max_blocks = max_blocks
        self.tables: Int32 = np.zeros((max_sequences, max_blocks), np.int32)
        self.num_blocks: Int32 = np.zeros(max_sequences, np.int32)
        self.num_computed: Int32 = np.zeros(max_sequences, np.int32)
        self.capacity: Int64 = np.zeros(max_sequences, np.int64)
        self.publish_at: Int64 = np.full(max_sequences, UNBOUNDED, np.int64)
        self.num_published: Int64 = np.zeros(max_sequences, np.int64)
        self.num_keyed: Int64 = np.zeros(max_sequences, np.int64)
        self.live: npt.NDArray[np.bool_] = np.zeros(max_sequences, np.bool_)
        self.expires_at: Floats = np.full(max_sequences, np.inf)
        self.idle_s: Floats = np.full(max_sequences, np.inf)
        self.dated = False  # whether anything here ever had a deadline: without one, publishing need not ask
        self.terms: list[Terms] = [NO_LIMIT] * max_sequences
        self.limits: dict[int, Floats] = {}
        self.keys: list[PrefixKeys | None] = [None] * max_sequences
        self._free = list(range(max_sequences - 1, -1, -1))

    @property
    def num_live(self) -> int:
        """Sequences that hold a row."""
        return self.max_sequences - len(self._free)

    def take(self) -> int:
        """An empty row; CapacityError if all are taken."""
        if not self._free:
            raise CapacityError(
                f"all {self.max_sequences} sequence rows are taken: wait for a release or raise max_num_seqs"
            )
        row = self._free.pop()
        self.live[row] = True
        self.num_blocks[row] = 0
        self.num_computed[row] = 0
        self.capacity[row] = 0
        self.publish_at[row] = UNBOUNDED
        return row

    def chain(self, row: int) -> PrefixKeys:
        """The row's keys; InvariantError if it holds no sequence."""
        keys = self.keys[row]
        if keys is None:
            raise InvariantError(f"row {row} holds no sequence: it was never admitted, or already released")
        return keys

    def set_keys(self, row: int, keys: PrefixKeys, block_size: int) -> None:
        """The row's chain is `keys`, which nobody else may extend."""
        self.keys[row] = keys
        self.num_keyed[row] = len(keys) * block_size

    def set_terms(self, row: int, terms: Terms) -> None:
        """What the row publishes is kept under `terms`."""
        self.expires_at[row] = terms.expires_at
        self.idle_s[row] = terms.idle_s
        self.terms[row] = terms
        self.dated = self.dated or min(terms.expires_at, terms.idle_s) < np.inf

    def limit(self, row: int, start: int, expires_at: Floats) -> None:
        """The row's block `start + i` must not outlive `expires_at[i]` seconds; of two limits the earlier holds."""
        had = self.limits.get(row, np.zeros(0))
        limits = np.full(max(len(had), start + len(expires_at)), np.inf)
        limits[: len(had)] = had
        limits[start : start + len(expires_at)] = np.minimum(limits[start : start + len(expires_at)], expires_at)
        self.limits[row] = limits
        self.dated = True

    def give_back(self, row: int) -> None:
        """Free the row; its blocks must have been dropped."""
        self.live[row] = False
        self.num_blocks[row] = 0
        self.capacity[row] = 0  # so that a commit to it is refused
        self.keys[row] = None
        self.limits.pop(row, None)
        self._free.append(row)

    def require_live(self, row: int) -> None:
        """InvariantError if the row holds no sequence."""
        if not (0 <= row < self.max_sequences and self.live[row]):
            raise InvariantError(f"row {row} holds no sequence: it was never admitted, or already released")

    def blocks(self, row: int) -> Blocks:
        """The row's blocks, a copy."""
        return self.tables[row, : self.num_blocks[row]].astype(np.int64)
