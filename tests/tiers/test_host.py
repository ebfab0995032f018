"""The host store: its book adds up, and memory that is used again never passes for what lay there before."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvwise.core.errors import CapacityError, InvariantError
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.blocks import restore_blocks, seal_blocks
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.host import HostStore
from kvwise.tiers.memory_store import MemoryStore
from kvwise.tiers.record import read_header
from tests.tiers.samples import IDENTITY, header_of, key_of, pieces_of, record_of

RAW = Raw()


def arena(num_blocks: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks, 3, 2, 16, 32)
    keys, values = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    return keys, values


def record_bytes() -> int:
    keys, values = arena(1, 0)
    return seal_blocks(RAW, 0, [header_of(0)], keys, values, [0])[0].num_bytes


def put(store: HostStore, numbers: list[int], keys: torch.Tensor, values: torch.Tensor) -> list[Fault | None]:
    records = seal_blocks(RAW, 0, [header_of(n) for n in numbers], keys, values, list(range(len(numbers))))
    return store.write([(key_of(n), record) for n, record in zip(numbers, records, strict=True)])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_raw_blocks_go_down_and_come_back(num_threads: int) -> None:
    keys, values = arena(12, 1)
    store = HostStore(12 * record_bytes(), num_threads=num_threads)
    numbers = list(range(12))
    assert put(store, numbers, keys, values) == [None] * 12
    assert store.num_bytes() == store.capacity_bytes == 12 * record_bytes()  # not a byte is lost
    out = torch.zeros_like(keys), torch.zeros_like(values)
    views = store.read([Extent(key_of(n)) for n in numbers])
    assert all(view.obj is views[0].obj for view in views)  # views of the arena
    assert restore_blocks(views, [key_of(n) for n in numbers], IDENTITY, RAW, 0, *out, numbers) == [None] * 12
    assert torch.equal(out[0], keys)
    assert torch.equal(out[1], values)
    store.check()


def test_records_of_one_size_always_lie_in_one_run() -> None:
    store, rng = HostStore(20 * record_bytes()), np.random.default_rng(0)
    keys, values = arena(20, 2)
    put(store, list(range(20)), keys, values)
    for _ in range(20):
        gone = rng.permutation(20)[:7].tolist()
        store.delete([key_of(n) for n in gone])
        assert put(store, gone, keys, values) == [None] * 7
        store.check()
    assert all(len(place.runs) == 1 for place in store._places.values())


def test_a_full_store_takes_a_replacement_of_the_same_size() -> None:
    store = HostStore(4 * record_bytes())
    for seed in (1, 2):
        keys, values = arena(4, seed)
        assert put(store, [0, 1, 2, 3], keys, values) == [None] * 4
        store.check()
    out = torch.zeros_like(keys), torch.zeros_like(values)
    views = store.read([Extent(key_of(n)) for n in range(4)])
    assert restore_blocks(views, [key_of(n) for n in range(4)], IDENTITY, RAW, 0, *out, [0, 1, 2, 3]) == [None] * 4
    assert torch.equal(out[0], keys)


def test_a_replacement_that_does_not_fit_takes_the_old_record_along() -> None:
    store = HostStore(1024)
    store.write([(key_of(1), pieces_of(1))])
    (fault,) = store.write([(key_of(1), pieces_of(1, 2, 800))])
    assert fault is not None
    assert fault.kind == FaultKind.FULL
    assert "of 1024 are free" in fault.detail
    (missing,) = store.read([Extent(key_of(1))])
    assert isinstance(missing, Fault)
    assert store.num_bytes() == 0
    store.check()


def test_one_key_twice_in_a_write_keeps_the_last() -> None:
    store = HostStore(1 << 16)
    assert store.write([(key_of(1), pieces_of(1, seed=1)), (key_of(1), pieces_of(1, seed=2))]) == [None, None]
    assert bytes(store.read([Extent(key_of(1))])[0]) == record_of(1, seed=2)
    store.check()


def test_a_write_that_raises_leaves_nothing_behind() -> None:
    store = HostStore(1 << 16)
    with pytest.raises(TypeError):
        store.write([(key_of(1), pieces_of(1)), (key_of(2), ["no bytes"])])
    with pytest.raises(TypeError):
        store.write([(key_of(1), pieces_of(1)), (key_of(2), [memoryview(np.zeros((4, 4), np.uint8)[:, ::2])])])
    assert store.num_bytes() == 0
    store.check()


def test_scattered_records_in_one_read_do_not_share_a_buffer() -> None:
    store = HostStore(40 * 512)
    sizes = {"num_segments": 1, "segment_bytes": 100}
    numbers = list(range(40))
    store.write([(key_of(n), pieces_of(n, **sizes)) for n in numbers])
    store.delete([key_of(n) for n in numbers if n % 2])
    large = [100, 101, 102]
    assert store.write([(key_of(n), pieces_of(n, 1, 1500)) for n in large]) == [None] * 3
    assert any(len(store._places[key_of(n)].runs) > 1 for n in large)
    views = store.read([Extent(key_of(n)) for n in large])
    assert [bytes(view) for view in views] == [record_of(n, 1, 1500) for n in large]
    assert sorted(read_header(view).key for view in store.scan()) == sorted(key_of(n) for n in [*numbers[::2], *large])


def test_views_cannot_be_written_through() -> None:
    store = HostStore(1 << 16)
    store.write([(key_of(1), pieces_of(1))])
    (view,) = store.read([Extent(key_of(1))])
    with pytest.raises(TypeError):
        view[0] = 1


def test_too_little_memory_is_said_at_once() -> None:
    with pytest.raises(CapacityError, match="63 bytes of host memory"):
        HostStore(63)


def test_closing_gives_the_memory_back_and_readers_keep_theirs() -> None:
    store = HostStore(1 << 16)
    store.write([(key_of(1), pieces_of(1))])
    (view,) = store.read([Extent(key_of(1))])
    store.close()
    assert bytes(view) == record_of(1)
    assert len(store._memory) == store.num_bytes() == 0
    store.check()


@pytest.mark.parametrize("broken", ["lost", "twice", "size", "count"])
def test_check_finds_a_book_that_does_not_add_up(broken: str) -> None:
    store = HostStore(1 << 16)
    store.write([(key_of(n), pieces_of(n)) for n in range(3)])
    store.check()
    place = store._places[key_of(1)]
    if broken == "lost":
        del store._places[key_of(1)]
    elif broken == "twice":
        store._places[key_of(9)] = place
    elif broken == "size":
        store._places[key_of(1)] = place._replace(num_bytes=place.num_bytes - 64)
    else:
        store._num_bytes += 64
    with pytest.raises(InvariantError):
        store.check()


def test_memory_used_again_under_a_reader_is_never_served_as_what_was_there() -> None:
    """Readers restore blocks from views while writers delete, wipe and reuse the memory below them."""
    num_blocks, rounds, most = 6, 60, 20_000  # more rounds until enough was served: writers may be late to begin
    versions = [arena(num_blocks, seed) for seed in range(3)]
    store = HostStore(4 * record_bytes())  # fewer places than keys: every write lies where another record lay
    stop, wrong, served = threading.Event(), [], [0]

    def write(worker: int) -> None:
        rng = np.random.default_rng(worker)
        while not stop.is_set():
            gone, come = (rng.permutation(num_blocks)[:2].tolist() for _ in range(2))
            store.delete([key_of(n) for n in gone], wipe=bool(rng.integers(2)))
            keys, values = versions[int(rng.integers(3))]
            records = seal_blocks(RAW, 0, [header_of(n) for n in come], keys, values, come)
            store.write([(key_of(n), record) for n, record in zip(come, records, strict=True)])

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(2)]
    for thread in writers:
        thread.start()
    numbers = list(range(num_blocks))
    out = torch.zeros_like(versions[0][0]), torch.zeros_like(versions[0][1])
    try:
        for done in range(most):
            if done >= rounds and served[0] >= 20:
                break
            views = store.read([Extent(key_of(n)) for n in numbers])
            faults = restore_blocks(views, [key_of(n) for n in numbers], IDENTITY, RAW, 0, *out, numbers)
            for n in (n for n in numbers if faults[n] is None):
                served[0] += 1
                if not any(torch.equal(out[0][n], k[n]) and torch.equal(out[1][n], v[n]) for k, v in versions):
                    wrong.append(n)
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert wrong == []
    assert served[0] >= 20
    store.check()


class HostMachine(RuleBasedStateMachine):
    """Random writes and deletes of records of all sizes against a dict; the sizes crumble the arena."""

    def __init__(self) -> None:
        super().__init__()
        self.store = HostStore(16 << 10)
        self.plain = MemoryStore()

    @rule(number=st.integers(0, 7), size=st.integers(0, 3000), seed=st.integers(0, 3))
    def write(self, number: int, size: int, seed: int) -> None:
        pieces = pieces_of(number, 1, size, seed=seed)
        (fault,) = self.store.write([(key_of(number), pieces)])
        room = self.store.capacity_bytes - self.plain.num_bytes()
        (older,) = self.plain.read([Extent(key_of(number))])
        room += 0 if isinstance(older, Fault) else len(older)
        assert (fault is not None) == (sum(map(len, pieces)) > room)  # refused only for lack of bytes
        if fault is None:
            self.plain.write([(key_of(number), pieces)])
        else:
            self.plain.delete([key_of(number)])

    @rule(number=st.integers(0, 7), wipe=st.booleans())
    def delete(self, number: int, wipe: bool) -> None:
        assert self.store.delete([key_of(number)], wipe=wipe) == self.plain.delete([key_of(number)])

    @invariant()
    def same_as_a_dict(self) -> None:
        extents = [Extent(key_of(n), start, stop) for n in range(8) for start, stop in ((0, None), (100, 900))]
        for mine, theirs in zip(self.store.read(extents), self.plain.read(extents), strict=True):
            assert (isinstance(mine, Fault) and mine.kind) == (isinstance(theirs, Fault) and theirs.kind)
            assert isinstance(mine, Fault) or bytes(mine) == bytes(theirs)
        assert self.store.num_bytes() == self.plain.num_bytes()
        self.store.check()


HostMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestHostMachine = HostMachine.TestCase
