"""Random operations on the cache against a plain model that holds the bytes: nothing leaks, nothing is overwritten.

The model keeps one number per slot of every page (which token, in which context, for which lane), writes it where the
engine would, and after every step reads all live sequences back. What is matchable it learns from the events alone.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvwise.cache.events import AllBlocksCleared, BlocksRemoved, BlocksStored
from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.cache.manager import CacheManager
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import CapacityError
from kvwise.policies.catalogue import make_policy

NUM_BLOCKS, LANES, SIZE, ROWS, LONGEST = 14, 4, 4, 6, 36
SALTS = ("", "", "", "a")

# Three texts that part from each other inside the third and the second block.
TEXTS = np.arange(3 * LONGEST).reshape(3, LONGEST)
TEXTS[1, :9] = TEXTS[0, :9]
TEXTS[2, :5] = TEXTS[0, :5]


@dataclass
class Sequence:
    """What the engine knows of one row; `kept` [lane] lists the positions a row with pages still has."""

    tokens: list[int]
    salt: str
    computed: int
    expires_at: float | None
    kept: list[list[int]] | None = None

    def content(self, position: int, lane: int) -> int:
        """What the bytes of this position and lane must be: they depend on all tokens up to it."""
        return hash((self.salt, tuple(self.tokens[: position + 1]), lane))


class CacheMachine(RuleBasedStateMachine):
    """Rules are what an engine does; invariants are what must hold between any two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        identity = Identity("m", "r", "float32", SIZE, 2, 2, 8, "rope")
        self.cache = CacheManager(
            num_blocks=NUM_BLOCKS,
            pages_per_block=LANES,
            block_size=SIZE,
            max_sequences=ROWS,
            max_blocks_per_sequence=LONGEST // SIZE + 1,
            sharing=True,
            identity=identity,
            policy=make_policy("lru", NUM_BLOCKS),
            clock=self.clock,
        )
        self.bytes = np.zeros((NUM_BLOCKS * LANES, SIZE), np.int64)
        self.live: dict[int, Sequence] = {}
        self.stored: dict[bytes, int] = {}
        self.expiry: dict[bytes, float] = {}
        self.pins: dict[bytes, float] = {}
        self.num_steps = 0

    # what the engine does ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(
        text=st.integers(0, 2),
        length=st.sampled_from([14, 17, 24, 8, 5, 1]),
        salt=st.sampled_from(SALTS),
        ttl=st.sampled_from([None, None, 3.0, 8.0]),
    )
    def admit(self, text: int, length: int, salt: str, ttl: float | None) -> None:
        tokens = TEXTS[text, :length].tolist()
        keys = self.cache.keys(np.array(tokens), salt)
        match = self.cache.match(keys, length)
        assert match.num_tokens == len(match.blocks) * SIZE == self.expected_hit(keys, length)
        expires_at = None if ttl is None else self.clock.now() + ttl
        row = self.cache.admit(match, keys, length, expires_at=expires_at)
        self.live[row] = Sequence(tokens, salt, match.num_tokens, expires_at)
        self.listen()
        if not self.reserve([row])[0]:
            self.release(row)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), chunk=st.sampled_from([LONGEST, 1, 5]))
    def prefill_chunk(self, data: st.DataObject, chunk: int) -> None:
        row = data.draw(st.sampled_from(self.unfinished()))
        sequence = self.live[row]
        self.compute([row], [min(len(sequence.tokens), sequence.computed + chunk)])

    @precondition(lambda self: self.decoding())
    @rule(turn=st.integers(0, 1))
    def decode_step(self, turn: int) -> None:
        rows = self.decoding()
        for row in rows:
            self.live[row].tokens.append(turn)
        granted = self.reserve(rows)
        for row, fits in zip(rows, granted, strict=True):
            if not fits:
                self.release(row)  # preempted
        rows = [row for row in rows if row in self.live]
        if rows:
            self.compute(rows, [len(self.live[row].tokens) for row in rows])

    @precondition(lambda self: self.live and self.num_steps % 2)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.live))))

    @precondition(lambda self: self.whole())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.whole()))
        available, parent = self.cache.num_available, self.live[row]
        try:
            twin, moves = self.cache.fork(row)
        except CapacityError:
            assert len(self.live) == ROWS or (available == 0 and parent.computed % SIZE)
            return
        self.listen()
        for source, target in moves:
            self.bytes[target * LANES : (target + 1) * LANES] = self.bytes[source * LANES : (source + 1) * LANES]
        child = Sequence(parent.tokens[:], parent.salt, parent.computed, parent.expires_at)
        self.live[twin] = child
        if not self.reserve([twin])[0]:
            self.release(twin)

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), aborted=st.booleans())
    def paginate(self, data: st.DataObject, aborted: bool) -> None:
        row = data.draw(st.sampled_from(self.whole()))
        sequence = self.live[row]
        num_blocks = int(self.cache.num_blocks[row])
        counts = data.draw(st.lists(st.integers(0, num_blocks + 1), min_size=LANES, max_size=LANES))
        stored = dict(self.stored)
        pages = self.cache.paginate(row, np.array(counts).reshape(2, 2))
        self.listen()
        if pages is None:
            assert self.stored == stored
            return
        blocks = self.cache.tables[row, :num_blocks].tolist()
        self.verify_bytes(without=row)
        if aborted:
            self.cache.check()
            self.release(row)
            return
        sequence.kept = [self.compact(sequence, blocks, lane, pages, count) for lane, count in enumerate(counts)]
        self.cache.finish_paginate(row)

    @precondition(lambda self: self.paged())
    @rule(data=st.data(), add=st.lists(st.integers(0, 2), min_size=LANES, max_size=LANES))
    def grow_pages(self, data: st.DataObject, add: list[int]) -> None:
        row = data.draw(st.sampled_from(self.paged()))
        _, counts = self.cache.page_table(row)
        wanted = counts + np.array(add).reshape(2, 2)
        room = self.cache.usage().num_pages_loose + self.cache.num_available * LANES
        pages = self.cache.grow_pages(row, wanted)
        assert (pages is not None) == (sum(add) <= room)

    @precondition(lambda self: self.paged())
    @rule(data=st.data())
    def trim_pages(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.paged()))
        _, counts = self.cache.page_table(row)
        fewer = np.maximum(counts - 1, 0)
        self.cache.trim_pages(row, fewer)
        kept = self.live[row].kept
        self.live[row].kept = [line[: n * SIZE] for line, n in zip(kept, fewer.flat, strict=True)]

    @precondition(lambda self: self.stored and len(self.pins) < 4)
    @rule(text=st.integers(0, 2), salt=st.sampled_from(SALTS), seconds=st.sampled_from([None, 2.0]))
    def pin(self, text: int, salt: str, seconds: float | None) -> None:
        keys = self.cache.keys(TEXTS[text, :12], salt)
        until = np.inf if seconds is None else self.clock.now() + seconds
        count = self.cache.pin(keys, None if seconds is None else until)
        for key in keys.chain[:count]:
            self.pins[key] = max(self.pins.get(key, until), until)

    @precondition(lambda self: self.pins)
    @rule(text=st.integers(0, 2), salt=st.sampled_from(SALTS))
    def unpin(self, text: int, salt: str) -> None:
        keys = self.cache.keys(TEXTS[text, :12], salt)
        self.cache.unpin(keys)
        for key in keys.chain:
            if key not in self.stored:
                break
            self.pins.pop(key, None)

    @precondition(lambda self: self.num_steps % 3 == 2)
    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0]), swept=st.booleans())
    def time_passes(self, seconds: float, swept: bool) -> None:
        self.clock.advance(seconds)
        if swept:
            self.cache.expire()
            self.pins = {key: until for key, until in self.pins.items() if until > self.clock.now()}

    @precondition(lambda self: self.num_steps % 20 == 19)
    @rule()
    def clear(self) -> None:
        self.cache.clear()

    # what must hold ----------------------------------------------------------------------------------

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.num_steps += 1
        self.listen()
        self.cache.check()
        self.verify_bytes()
        taken = {block for row in self.whole() for block in self.blocks(row)}
        for row in self.paged():
            pages, counts = self.cache.page_table(row)
            lines = zip(pages.reshape(LANES, pages.shape[-1]), counts.flat, strict=True)
            taken |= {int(page) // LANES for line, n in lines for page in line[:n]}
        pinned = {key for key in self.pins if key in self.stored}
        due = {key for key in pinned if min(self.pins[key], self.expiry.get(key, np.inf)) <= self.clock.now()}
        most = NUM_BLOCKS - len(taken | {self.stored[key] for key in pinned - due})
        least = NUM_BLOCKS - len(taken | {self.stored[key] for key in pinned})
        assert least <= self.cache.num_available <= most
        assert self.cache.usage().num_sequences == len(self.live)

    def teardown(self) -> None:
        for row in sorted(self.live):
            self.release(row)
        self.cache.clear()
        self.cache.check()
        assert self.cache.usage().num_free == NUM_BLOCKS

    # helpers -------------------------------------------------------------------------------------------

    def whole(self) -> list[int]:
        return sorted(row for row, sequence in self.live.items() if sequence.kept is None)

    def paged(self) -> list[int]:
        return sorted(row for row, sequence in self.live.items() if sequence.kept is not None)

    def unfinished(self) -> list[int]:
        return [row for row in self.whole() if self.live[row].computed < len(self.live[row].tokens)]

    def decoding(self) -> list[int]:
        ready = [row for row in self.whole() if row not in self.unfinished()]
        return [row for row in ready if len(self.live[row].tokens) < LONGEST]

    def blocks(self, row: int) -> list[int]:
        return self.cache.tables[row, : self.cache.num_blocks[row]].tolist()

    def expected_hit(self, keys: PrefixKeys, length: int) -> int:
        count = 0
        for key in keys.chain[: (length - 1) // SIZE]:
            if key not in self.stored or self.expiry.get(key, np.inf) <= self.clock.now():
                break
            count += 1
        return count * SIZE

    def reserve(self, rows: list[int]) -> list[bool]:
        lengths = np.array([len(self.live[row].tokens) for row in rows])
        need = -(-lengths // SIZE) - self.cache.num_blocks[rows]
        room = self.cache.num_available
        granted = self.cache.reserve_many(np.array(rows), lengths).tolist()
        for fits, count in zip(granted, need.tolist(), strict=True):
            assert fits == (count <= room)
            room -= count if fits else 0
        self.listen()
        return granted

    def compute(self, rows: list[int], totals: list[int]) -> None:
        """Write the bytes, then commit: full blocks must be matchable at once."""
        # Of two rows that fill the same block in one commit the first stores it.
        filled: dict[bytes, float] = {}
        for row, total in zip(rows, totals, strict=True):
            sequence = self.live[row]
            filled = self.filled(sequence, total) | filled
            for position in range(sequence.computed, total):
                block = self.cache.tables[row, position // SIZE]
                for lane in range(LANES):
                    self.bytes[block * LANES + lane, position % SIZE] = sequence.content(position, lane)
            sequence.computed = total
        ids, lengths = np.array(rows), np.array(totals)
        for i in self.cache.keyless(ids, lengths).tolist():
            known = self.cache.num_keyed(rows[i])
            self.cache.extend_keys(rows[i], np.array(self.live[rows[i]].tokens[known : totals[i]]))
        self.cache.commit(ids, lengths)
        self.listen(filled)
        assert filled.keys() <= self.stored.keys()

    def filled(self, sequence: Sequence, total: int) -> dict[bytes, float]:
        """Keys of the blocks that are full once `total` tokens are computed, and when they expire."""
        keys = self.cache.keys(np.array(sequence.tokens[:total]), sequence.salt)
        at = np.inf if sequence.expires_at is None else sequence.expires_at
        return dict.fromkeys(keys.chain[sequence.computed // SIZE :], at)

    def release(self, row: int) -> None:
        self.cache.release(row)
        del self.live[row]
        self.listen()

    def listen(self, filled: dict[bytes, float] | None = None) -> None:
        """Follow the events; nothing referenced or pinned may ever have been evicted."""
        for event in self.cache.drain_events():
            if isinstance(event, BlocksStored):
                self.stored.update(zip(event.keys, event.blocks, strict=True))
                assert filled is not None, "only a commit makes blocks matchable"
                self.expiry.update({key: filled[key] for key in event.keys})
            elif isinstance(event, BlocksRemoved):
                for key in event.keys:
                    if event.reason == "evicted":
                        assert self.pins.get(key, -1.0) <= event.at
                    del self.stored[key]
                    self.expiry.pop(key, None)
                    self.pins.pop(key, None)
            else:
                assert isinstance(event, AllBlocksCleared)
                assert not self.stored

    def compact(self, sequence: Sequence, blocks: list[int], lane: int, pages: np.ndarray, count: int) -> list[int]:
        """Keep the first and the latest tokens that fit `count` pages, moving slots strictly in order."""
        line = pages.reshape(LANES, pages.shape[-1])[lane]
        room = min(count * SIZE, sequence.computed)
        kept = [*range(room // 3), *range(sequence.computed - (room - room // 3), sequence.computed)]
        for slot, position in enumerate(kept):
            source = blocks[position // SIZE] * LANES + lane
            self.bytes[line[slot // SIZE], slot % SIZE] = self.bytes[source, position % SIZE]
        return kept

    def verify_bytes(self, without: int | None = None) -> None:
        for row, sequence in self.live.items():
            if row == without:
                continue
            for lane in range(LANES):
                if sequence.kept is None:
                    pages = np.array(self.blocks(row), np.int64) * LANES + lane
                    positions: list[int] = list(range(sequence.computed))
                else:
                    table, _ = self.cache.page_table(row)
                    pages = table.reshape(LANES, table.shape[-1])[lane]
                    positions = sequence.kept[lane]
                held = self.bytes[pages].reshape(-1)[: len(positions)].tolist()
                assert held == [sequence.content(position, lane) for position in positions]


CacheMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestCacheMachine = CacheMachine.TestCase
