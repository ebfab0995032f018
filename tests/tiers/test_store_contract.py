"""One contract for every store: what goes in comes out whole, or there is a fault for that item and for no other."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from kvwise.tiers.base import ByteStore, Extent, Fault, FaultKind
from kvwise.tiers.record import header_bytes, read_header
from tests.tiers.samples import header_of, is_sound, key_of, pieces_of, record_of
from tests.tiers.stores import STORES, UNBOUNDED, Opened

ROOMY = 1 << 20


@pytest.fixture(params=list(STORES))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """`make(capacity_bytes)`: a fresh store of each kind, closed when the test ends."""
    with ExitStack() as stack:
        yield lambda capacity_bytes=ROOMY: stack.enter_context(STORES[request.param](tmp_path, capacity_bytes))


@pytest.fixture
def store(make: Callable[..., Opened]) -> ByteStore:
    return make().store


def whole(store: ByteStore, key: bytes) -> bytes | FaultKind:
    """One record, copied, or the kind of its fault."""
    (got,) = store.read([Extent(key)])
    return got.kind if isinstance(got, Fault) else bytes(got)


def put(store: ByteStore, *numbers: int, seed: int = 0) -> None:
    assert store.write([(key_of(n), pieces_of(n, seed=seed)) for n in numbers]) == [None] * len(numbers)


def test_what_was_written_is_read(store: ByteStore) -> None:
    put(store, 1, 2, 3)
    got = store.read([Extent(key_of(n)) for n in (3, 1, 2)])
    assert [bytes(view) for view in got] == [record_of(n) for n in (3, 1, 2)]


def test_nothing_asked_nothing_answered(store: ByteStore) -> None:
    assert store.write([]) == store.read([]) == store.delete([]) == []
    assert list(store.scan()) == []
    assert store.num_bytes() == 0


def test_pieces_may_be_of_any_kind_and_number(store: ByteStore) -> None:
    record = record_of(7, num_segments=3, segment_bytes=4000)
    pieces = [
        bytearray(record[:100]),
        b"",
        memoryview(record)[100:101],
        memoryview(np.frombuffer(record[101:301], "<i2")),
    ]
    pieces += [memoryview(record)[i : i + 4] for i in range(301, len(record), 4)]  # more than one system call may take
    assert len(pieces) > 2048
    assert store.write([(key_of(7), pieces)]) == [None]
    assert whole(store, key_of(7)) == record


def test_extents_are_cut_at_the_end_of_the_record(store: ByteStore) -> None:
    put(store, 1, 2)
    record = record_of(1)
    size = len(record)
    ranges = [(0, None), (0, 10), (64, 200), (size - 3, None), (size - 3, size + 50), (5, size), (9, 9), (size, None)]
    ranges += [(size + 7, size + 9), (0, 1), (63, 65)]
    got = store.read([Extent(key_of(1), start, stop) for start, stop in ranges])
    assert [bytes(view) for view in got] == [record[start:stop] for start, stop in ranges]


def test_a_key_that_is_there_is_replaced(store: ByteStore) -> None:
    put(store, 1, 2)
    for size in (600, 30, 200):  # longer, shorter, as before: nothing of the old one shows behind the end
        pieces = pieces_of(1, 3, size, seed=size)
        assert store.write([(key_of(1), pieces)]) == [None]
        assert whole(store, key_of(1)) == b"".join(pieces)
    assert whole(store, key_of(2)) == record_of(2)
    assert len(list(store.scan())) == 2


def test_deleted_is_missing_and_may_come_back(store: ByteStore) -> None:
    put(store, 1, 2, 3)
    assert store.delete([key_of(1), key_of(3)]) == [None, None]
    assert [whole(store, key_of(n)) for n in (1, 3)] == [FaultKind.MISSING] * 2
    assert whole(store, key_of(2)) == record_of(2)
    put(store, 1, seed=9)
    assert whole(store, key_of(1)) == record_of(1, seed=9)


@pytest.mark.parametrize("wipe", [False, True])
def test_deleting_what_is_absent_is_no_fault(store: ByteStore, wipe: bool) -> None:
    put(store, 1)
    assert store.delete([key_of(5), key_of(1), key_of(6), key_of(1)], wipe=wipe) == [None] * 4
    assert whole(store, key_of(1)) == FaultKind.MISSING


def test_an_absent_key_does_not_take_its_neighbours_along(store: ByteStore) -> None:
    put(store, 1, 2)
    first, absent, second = store.read([Extent(key_of(1)), Extent(key_of(9)), Extent(key_of(2), 64, 128)])
    assert isinstance(absent, Fault)
    assert absent.kind == FaultKind.MISSING
    assert bytes(first) == record_of(1)
    assert bytes(second) == record_of(2)[64:128]


@pytest.fixture
def small(make: Callable[..., Opened], request: pytest.FixtureRequest) -> ByteStore:
    """A store of 64 KiB."""
    if request.node.callspec.params["make"] in UNBOUNDED:
        pytest.skip("this store takes whatever there is room for on its medium")
    return make(64 << 10).store


def test_one_too_large_does_not_take_its_neighbours_along(small: ByteStore) -> None:
    store = small
    faults = store.write([(key_of(1), pieces_of(1)), (key_of(2), pieces_of(2, 4, 64 << 10)), (key_of(3), pieces_of(3))])
    assert [fault and fault.kind for fault in faults] == [None, FaultKind.FULL, None]
    assert whole(store, key_of(2)) == FaultKind.MISSING
    assert [whole(store, key_of(n)) for n in (1, 3)] == [record_of(1), record_of(3)]


def test_full_says_so_and_room_made_is_room_again(small: ByteStore) -> None:
    store = small
    numbers = range(40)  # 4 KiB and some each: they cannot all fit
    faults = store.write([(key_of(n), pieces_of(n, 1, 4 << 10)) for n in numbers])
    kept = [n for n, fault in zip(numbers, faults, strict=True) if fault is None]
    assert {fault.kind for fault in faults if fault} == {FaultKind.FULL}
    assert 8 <= len(kept) <= 16
    assert [whole(store, key_of(n)) for n in kept] == [record_of(n, 1, 4 << 10) for n in kept]
    assert store.delete([key_of(n) for n in kept[:4]]) == [None] * 4
    assert store.write([(key_of(n), pieces_of(n, 1, 4 << 10)) for n in kept[:4]]) == [None] * 4


def test_the_bytes_taken_are_told(store: ByteStore) -> None:
    put(store, 1, 2, 3)
    assert store.num_bytes() >= sum(len(record_of(n)) for n in (1, 2, 3))
    store.delete([key_of(n) for n in (1, 2, 3)])
    assert store.num_bytes() == 0


def test_a_scan_gives_the_header_of_every_record(store: ByteStore) -> None:
    put(store, 1, 2, 3)
    store.write([(key_of(4), pieces_of(4, num_segments=90))])  # a header longer than a page
    store.delete([key_of(2)])
    headers = [read_header(view) for view in store.scan()]
    assert sorted(header.key for header in headers) == sorted(key_of(n) for n in (1, 3, 4))
    assert {len(header.segments) for header in headers} == {2, 90}
    assert all(len(view) >= header_bytes(2) for view in store.scan())
    assert all(header.stored_at == header_of(header.depth).stored_at for header in headers)


def test_a_view_lives_until_the_next_read_of_its_thread(store: ByteStore) -> None:
    put(store, 1, 2)
    (mine,) = store.read([Extent(key_of(1))])
    other = threading.Thread(target=lambda: [whole(store, key_of(2)) for _ in range(3)])
    other.start()
    other.join()
    assert bytes(mine) == record_of(1)


def test_closed_is_off(store: ByteStore) -> None:
    put(store, 1)
    store.close()
    store.close()
    for faults in (
        store.write([(key_of(2), pieces_of(2)), (key_of(3), pieces_of(3))]),
        store.read([Extent(key_of(1)), Extent(key_of(2))]),
        store.delete([key_of(1), key_of(2)], wipe=True),
    ):
        assert [fault.kind for fault in faults] == [FaultKind.OFF] * 2
    assert list(store.scan()) == []


def test_a_persistent_store_finds_its_records_again(make: Callable[..., Opened]) -> None:
    opened = make()
    assert opened.store.persistent == (opened.reopen is not None)
    if opened.reopen is None:
        return
    put(opened.store, 1, 2, 3)
    opened.store.delete([key_of(2)])
    opened.store.close()
    store = opened.reopen()
    assert sorted(read_header(view).key for view in store.scan()) == sorted([key_of(1), key_of(3)])
    assert [whole(store, key_of(n)) for n in (1, 2, 3)] == [record_of(1), FaultKind.MISSING, record_of(3)]
    store.close()


def test_wiped_bytes_are_gone_from_the_medium(make: Callable[..., Opened]) -> None:
    opened = make()
    if opened.medium is None:
        pytest.skip("the medium cannot be looked at")
    put(opened.store, 1, 5)  # no neighbours: a record names its parent's key
    assert opened.store.wipes
    bodies = [record_of(n)[header_bytes(2) :][:64] for n in (1, 5)]  # what certainly lies in one run
    assert all(body in opened.medium() for body in bodies)
    assert opened.store.delete([key_of(1)], wipe=True) == [None]
    medium = opened.medium()
    assert bodies[0] not in medium
    assert bodies[0][:32] not in medium
    assert key_of(1) not in medium
    assert bodies[1] in medium
    assert whole(opened.store, key_of(5)) == record_of(5)


def test_a_flipped_bit_anywhere_in_a_thousand_records_is_a_miss(store: ByteStore) -> None:
    rng = np.random.default_rng(0)
    for start in range(0, 1000, 100):
        damaged = {}
        for n in range(start, start + 100):
            record = bytearray(record_of(n % 50))
            # Half of the bits in the header, half behind it, all over both.
            low, high = ((0, header_bytes(2)), (header_bytes(2), len(record)))[n % 2]
            record[low + (n * 7919 + int(rng.integers(3))) % (high - low)] ^= 1 << int(rng.integers(8))
            damaged[n] = bytes(record)
        # Any answer will do, but never bytes that would be served.
        faults = store.write([(key_of(n), [record]) for n, record in damaged.items()])
        got = store.read([Extent(key_of(n)) for n in damaged])
        for n, fault, view in zip(damaged, faults, got, strict=True):
            assert fault or isinstance(view, Fault) or not is_sound(view, n % 50)
        store.delete([key_of(n) for n in damaged])


def test_threads_never_see_wrong_bytes(store: ByteStore) -> None:
    """Four threads write, replace, read and delete keys of their own and keys they share."""
    wrong: list[str] = []

    def work(worker: int) -> None:
        rng = np.random.default_rng(worker)
        mine: dict[int, bytes] = {}
        for step in range(60):
            number = 100 * worker + int(rng.integers(4))
            shared = 1000 + int(rng.integers(3))
            seed = int(rng.integers(5))
            action = rng.integers(4)
            if action < 2:
                sizes = {"num_segments": 2, "segment_bytes": 1000}
                store.write([(key_of(n), pieces_of(n, seed=seed, **sizes)) for n in (number, shared)])
                mine[number] = record_of(number, seed=seed, **sizes)
            elif action == 2:
                store.delete([key_of(number), key_of(shared)], wipe=bool(step % 2))
                mine.pop(number, None)
            own = whole(store, key_of(number))
            if own != mine.get(number, FaultKind.MISSING):
                wrong.append(f"worker {worker} step {step}: its own record {number}")
            (view,) = store.read([Extent(key_of(shared))])
            # What another thread is changing may be torn, but a torn record must not pass for a sound one.
            copy = None if isinstance(view, Fault) else bytes(view)
            versions = {record_of(shared, 2, 1000, seed=s) for s in range(5)}
            if copy is not None and is_sound(copy, shared) and copy not in versions:
                wrong.append(f"worker {worker} step {step}: shared record {shared}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
