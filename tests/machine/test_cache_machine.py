"""Random operations on the cache against a plain model that holds the bytes: nothing leaks, nothing is overwritten.

The model keeps one number per slot of every page (which token, in which context, for which lane), writes it where the
engine would, and after every step reads all live sequences back. Packed pages are two slots each, in the same memory,
and hold a stamp of their own. What is matchable it learns from the events alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count as count_up
from math import inf

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvwise.cache.events import AllBlocksCleared, BlocksRemoved, BlocksStored
from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.cache.manager import CacheManager
from kvwise.cache.misses import RemovalReason
from kvwise.cache.terms import NO_LIMIT, Terms
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import CapacityError
from kvwise.policies.catalogue import make_policy

NUM_BLOCKS, LANES, SIZE, ROWS, LONGEST = 14, 4, 4, 6, 36
PACKED = 8  # packed pages a block
SALTS = ("", "", "", "a")
QUOTAS = {"a": 3}  # published blocks; a salt's tenant has its name

# Three texts that part from each other inside the third and the second block.
TEXTS = np.arange(3 * LONGEST).reshape(3, LONGEST)
TEXTS[1, :9] = TEXTS[0, :9]
TEXTS[2, :5] = TEXTS[0, :5]


@dataclass
class Sequence:
    """What the engine knows of one row; `kept` [lane] lists the positions a row with pages still has, `packed` [lane]
    the stamps of its packed pages."""

    tokens: list[int]
    salt: str
    computed: int
    terms: Terms = NO_LIMIT
    limits: dict[int, float] = field(default_factory=dict)
    kept: list[list[int]] | None = None
    packed: list[list[int]] = field(default_factory=lambda: [[] for _ in range(LANES)])

    def content(self, position: int, lane: int) -> int:
        """What the bytes of this position and lane must be: they depend on all tokens up to it."""
        return hash((self.salt, tuple(self.tokens[: position + 1]), lane))


@dataclass
class Hold:
    """A transfer under way: its blocks, what their bytes were, and the sequence that may still write them."""

    blocks: np.ndarray
    bytes: np.ndarray
    owner: Sequence | None


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
            quotas=QUOTAS,
            packed_per_block=PACKED,
        )
        self.bytes = np.zeros((NUM_BLOCKS * LANES, SIZE), np.int64)
        self.packed_bytes = self.bytes.reshape(NUM_BLOCKS * PACKED, -1)
        self.stamps = count_up(1)
        self.live: dict[int, Sequence] = {}
        self.stored: dict[bytes, int] = {}
        self.kept_until: dict[bytes, Terms] = {}
        self.expiry: dict[bytes, float] = {}
        self.holds: list[Hold] = []
        self.pins: dict[bytes, float] = {}
        self.num_steps = 0

    # what the engine does ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(
        text=st.integers(0, 2),
        length=st.sampled_from([14, 17, 24, 8, 5, 1]),
        salt=st.sampled_from(SALTS),
        ttl=st.sampled_from([inf, inf, 3.0, 8.0]),
        idle=st.sampled_from([inf, inf, 2.0, 4.0]),
        num_last=st.sampled_from([1, 1, 6]),
    )
    def admit(self, text: int, length: int, salt: str, ttl: float, idle: float, num_last: int) -> None:
        tokens = TEXTS[text, :length].tolist()
        keys = self.cache.keys(np.array(tokens), salt)
        match = self.cache.match(keys, length, num_last)
        assert match.num_tokens == len(match.blocks) * SIZE == self.expected_hit(keys, length, num_last)
        terms = Terms(self.clock.now() + ttl, idle, salt)
        row = self.cache.admit(match, keys, length, terms=terms)
        self.live[row] = Sequence(tokens, salt, match.num_tokens, terms)
        assert self.cache.chain(row).chain == keys.chain
        for key in keys.chain[: len(match.blocks)]:
            self.expiry[key] = self.kept_until[key].deadline(self.clock.now())
            assert self.expiry[key] <= self.kept_until[key].expires_at
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
        child = Sequence(parent.tokens[:], parent.salt, parent.computed, parent.terms, dict(parent.limits))
        self.live[twin] = child
        if not self.reserve([twin])[0]:
            self.release(twin)

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), aborted=st.booleans(), packs=st.booleans())
    def paginate(self, data: st.DataObject, aborted: bool, packs: bool) -> None:
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
        if packs:  # from the old table, which must still be whole when `compact` reads it
            self.pack(row, [1, 2, 0, 1])
            self.cache.check()
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

    @precondition(lambda self: self.paged())
    @rule(
        data=st.data(),
        dropped=st.lists(st.integers(0, 2), min_size=LANES, max_size=LANES),
        wanted=st.lists(st.integers(0, 4), min_size=LANES, max_size=LANES),
    )
    def shift_pages(self, data: st.DataObject, dropped: list[int], wanted: list[int]) -> None:
        row = data.draw(st.sampled_from(self.paged()))
        before, counts = self.cache.page_table(row)
        gone = np.minimum(dropped, counts.reshape(-1))
        room = self.cache.usage().num_pages_loose + self.cache.num_available * LANES
        pages = self.cache.shift_pages(row, gone.reshape(2, 2), np.array(wanted).reshape(2, 2))
        assert (pages is not None) == (sum(wanted) - int(counts.sum()) <= room)
        if pages is None:
            assert self.cache.page_table(row)[0] is before
            return
        kept = self.live[row].kept
        self.live[row].kept = [
            line[n * SIZE : (n + most) * SIZE] for line, n, most in zip(kept, gone.tolist(), wanted, strict=True)
        ]

    @precondition(lambda self: self.paged())
    @rule(data=st.data(), add=st.lists(st.integers(0, 5), min_size=LANES, max_size=LANES))
    def grow_packed(self, data: st.DataObject, add: list[int]) -> None:
        self.pack(data.draw(st.sampled_from(self.paged())), add)

    @precondition(lambda self: self.with_packed())
    @rule(data=st.data(), keeps=st.sampled_from([lambda i: i % 2 == 1, lambda i: i < 1, lambda i: i >= 2]))
    def drop_packed(self, data: st.DataObject, keeps: Callable[[int], bool]) -> None:
        row = data.draw(st.sampled_from(self.with_packed()))
        sequence = self.live[row]
        tables, counts = self.cache.packed_table(row)
        assert counts.reshape(-1).tolist() == [len(line) for line in sequence.packed]
        lanes = data.draw(st.sets(st.integers(0, LANES - 1), min_size=1))
        gone = np.zeros((LANES, tables.shape[-1]), np.bool_)
        for lane in lanes:
            line = sequence.packed[lane]
            gone[lane, : len(line)] = [not keeps(i) for i in range(len(line))]
            sequence.packed[lane] = [stamp for i, stamp in enumerate(line) if keeps(i)]
        self.cache.drop_packed(row, gone.reshape(tables.shape))

    @precondition(lambda self: self.whole() and len(self.holds) < 2)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.whole()))
        start = data.draw(st.integers(0, int(self.cache.num_blocks[row])))
        stop = data.draw(st.integers(start, min(start + 2, int(self.cache.num_blocks[row]))))
        blocks = self.cache.hold(row, start, stop)
        assert blocks.tolist() == self.blocks(row)[start:stop]
        self.holds.append(Hold(blocks, self.bytes_of(blocks), self.live[row]))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        held = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        self.cache.let_go(held.blocks)
        self.listen()

    @precondition(lambda self: self.unfinished())
    @rule(
        data=st.data(),
        start=st.integers(0, 4),
        seconds=st.lists(st.sampled_from([1.0, 4.0, inf]), min_size=1, max_size=3),
    )
    def set_expiry(self, data: st.DataObject, start: int, seconds: list[float]) -> None:
        row = data.draw(st.sampled_from(self.unfinished()))
        deadlines = self.clock.now() + np.array(seconds)
        self.cache.set_expiry(row, start, deadlines)
        limits = self.live[row].limits
        for i, at in enumerate(deadlines.tolist(), start):
            limits[i] = min(at, limits.get(i, inf))

    @precondition(lambda self: self.stored and len(self.holds) < 2)
    @rule(text=st.integers(0, 2), salt=st.sampled_from(SALTS), first=st.integers(0, 2))
    def withdraw(self, text: int, salt: str, first: int) -> None:
        keys = self.cache.keys(TEXTS[text, :16], salt).chain[first:]
        taken = self.taken()
        blocks = {self.stored[key] for key in keys if key in self.stored}
        withdrawn = self.cache.withdraw(keys, RemovalReason.PURGED)
        assert set(withdrawn.blocks.tolist()) == blocks - taken
        assert withdrawn.kept == len(blocks & taken)
        self.listen()
        assert not self.stored.keys() & set(keys)
        pages = (withdrawn.blocks[:, None] * LANES + np.arange(LANES)).reshape(-1)
        self.bytes[pages] = -1
        self.holds.append(Hold(withdrawn.blocks, self.bytes_of(withdrawn.blocks), None))

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
        self.verify_holds()
        taken = self.taken()
        pinned = {key for key in self.pins if key in self.stored}
        due = {key for key in pinned if min(self.pins[key], self.expiry.get(key, np.inf)) <= self.clock.now()}
        most = NUM_BLOCKS - len(taken | {self.stored[key] for key in pinned - due})
        least = NUM_BLOCKS - len(taken | {self.stored[key] for key in pinned})
        assert least <= self.cache.num_available <= most
        deadlines = self.cache._store.lifecycle.expiry.at
        assert {key: deadlines[block] for key, block in self.stored.items()} == self.expiry
        assert {key: terms.tenant for key, terms in self.cache.stored()} == {
            key: terms.tenant for key, terms in self.kept_until.items()
        }
        usage = self.cache.usage()
        assert usage.num_sequences == len(self.live)
        assert usage.num_packed_held == sum(len(line) for row in self.live.values() for line in row.packed)
        assert usage.num_packed_used + usage.num_packed_loose == len(self.packed_blocks()) * PACKED
        assert usage.num_held == len({block for held in self.holds for block in held.blocks.tolist()})
        assert self.cache.tenant_blocks("a") == len(self.stored_by("a")) <= QUOTAS["a"]

    def teardown(self) -> None:
        for row in sorted(self.live):
            self.release(row)
        for held in self.holds:
            self.cache.let_go(held.blocks)
        self.cache.clear()
        self.cache.check()
        assert self.cache.usage().num_free == NUM_BLOCKS

    # helpers -------------------------------------------------------------------------------------------

    def whole(self) -> list[int]:
        return sorted(row for row, sequence in self.live.items() if sequence.kept is None)

    def paged(self) -> list[int]:
        return sorted(row for row, sequence in self.live.items() if sequence.kept is not None)

    def with_packed(self) -> list[int]:
        return [row for row in self.paged() if any(self.live[row].packed)]

    def packed_blocks(self) -> set[int]:
        return {int(page) // PACKED for row in self.paged() for line in self.packed_pages(row) for page in line}

    def packed_pages(self, row: int) -> list[np.ndarray]:
        tables, counts = self.cache.packed_table(row)
        lines = tables.reshape(LANES, tables.shape[-1])
        return [line[:n] for line, n in zip(lines, counts.flat, strict=True)]

    def pack(self, row: int, add: list[int]) -> None:
        """Grow by `add` packed pages a lane, and stamp them."""
        sequence = self.live[row]
        room = self.cache.usage().num_packed_loose + self.cache.num_available * PACKED
        wanted = np.array([len(line) for line in sequence.packed]) + add
        tables = self.cache.grow_packed(row, wanted.reshape(2, 2))
        self.listen()
        assert (tables is not None) == (sum(add) <= room)
        if tables is None:
            return
        for stamps, pages in zip(sequence.packed, self.packed_pages(row), strict=True):
            for page in pages[len(stamps) :].tolist():
                stamps.append(-next(self.stamps))
                self.packed_bytes[page] = stamps[-1]

    def unfinished(self) -> list[int]:
        return [row for row in self.whole() if self.live[row].computed < len(self.live[row].tokens)]

    def decoding(self) -> list[int]:
        ready = [row for row in self.whole() if row not in self.unfinished()]
        return [row for row in ready if len(self.live[row].tokens) < LONGEST]

    def blocks(self, row: int) -> list[int]:
        return self.cache.tables[row, : self.cache.num_blocks[row]].tolist()

    def taken(self) -> set[int]:
        """Blocks that a sequence or a transfer holds."""
        taken = {block for row in self.whole() for block in self.blocks(row)}
        for row in self.paged():
            pages, counts = self.cache.page_table(row)
            lines = zip(pages.reshape(LANES, pages.shape[-1]), counts.flat, strict=True)
            taken |= {int(page) // LANES for line, n in lines for page in line[:n]}
        taken |= self.packed_blocks()
        return taken | {block for held in self.holds for block in held.blocks.tolist()}

    def stored_by(self, tenant: str) -> list[bytes]:
        return [key for key in self.stored if self.kept_until[key].tenant == tenant]

    def bytes_of(self, blocks: np.ndarray) -> np.ndarray:
        return self.bytes.reshape(NUM_BLOCKS, -1)[blocks].copy()

    def expected_hit(self, keys: PrefixKeys, length: int, num_last: int) -> int:
        num_found = 0
        for key in keys.chain[: max(length - num_last, 0) // SIZE]:
            if key not in self.stored or self.expiry.get(key, np.inf) <= self.clock.now():
                break
            num_found += 1
        return num_found * SIZE

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
        filled: dict[bytes, Terms] = {}
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
        before = set(self.stored)
        self.cache.commit(ids, lengths)
        self.listen(filled)
        refused = filled.keys() - self.stored.keys() - before
        if refused:
            assert {filled[key].tenant for key in refused} <= QUOTAS.keys()
            own, taken = self.stored_by("a"), self.taken()
            assert len(own) == QUOTAS["a"], "refused below the quota"
            assert all(self.stored[key] in taken or key in self.pins for key in own), (
                "an own idle block might have left"
            )

    def filled(self, sequence: Sequence, total: int) -> dict[bytes, Terms]:
        """Keys of the blocks that are full once `total` tokens are computed, and their terms."""
        keys = self.cache.keys(np.array(sequence.tokens[:total]), sequence.salt)
        terms = sequence.terms
        return {
            key: Terms(min(terms.expires_at, sequence.limits.get(i, inf)), terms.idle_s, terms.tenant)
            for i, key in enumerate(keys.chain)
            if i >= sequence.computed // SIZE
        }

    def release(self, row: int) -> None:
        self.cache.release(row)
        del self.live[row]
        self.listen()

    def listen(self, filled: dict[bytes, Terms] | None = None) -> None:
        """Follow the events; nothing referenced or pinned may ever have been evicted."""
        for event in self.cache.drain_events():
            if isinstance(event, BlocksStored):
                self.stored.update(zip(event.keys, event.blocks, strict=True))
                assert filled is not None, "only a commit makes blocks matchable"
                self.kept_until.update({key: filled[key] for key in event.keys})
                self.expiry.update({key: filled[key].deadline(event.at) for key in event.keys})
            elif isinstance(event, BlocksRemoved):
                for key in event.keys:
                    if event.reason == RemovalReason.EXPIRED:
                        assert self.expiry[key] <= event.at
                    if event.reason == RemovalReason.EVICTED:
                        assert not any(self.stored[key] in held.blocks for held in self.holds)
                        assert self.pins.get(key, -1.0) <= event.at
                    del self.stored[key]
                    del self.expiry[key], self.kept_until[key]
                    self.pins.pop(key, None)
            else:
                assert isinstance(event, AllBlocksCleared)
                assert not self.stored

    def compact(self, sequence: Sequence, blocks: list[int], lane: int, pages: np.ndarray, num_pages: int) -> list[int]:
        """Keep the first and the latest tokens that fit `count` pages, moving slots strictly in order."""
        line = pages.reshape(LANES, pages.shape[-1])[lane]
        room = min(num_pages * SIZE, sequence.computed)
        kept = [*range(room // 3), *range(sequence.computed - (room - room // 3), sequence.computed)]
        for slot, position in enumerate(kept):
            source = blocks[position // SIZE] * LANES + lane
            self.bytes[line[slot // SIZE], slot % SIZE] = self.bytes[source, position % SIZE]
        return kept

    def verify_holds(self) -> None:
        """Nobody but the row it was held for has written a held block."""
        for held in self.holds:
            if any(sequence is held.owner for sequence in self.live.values()):
                held.bytes = self.bytes_of(held.blocks)
            assert np.array_equal(self.bytes_of(held.blocks), held.bytes)

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
            if sequence.kept is not None:
                for stamps, packed in zip(sequence.packed, self.packed_pages(row), strict=True):
                    assert self.packed_bytes[packed].tolist() == [[stamp, stamp] for stamp in stamps]


CacheMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestCacheMachine = CacheMachine.TestCase
