"""What the reference store does beyond the contract."""

from kvwise.tiers.base import Extent, FaultKind
from kvwise.tiers.memory_store import MemoryStore
from tests.tiers.samples import key_of, pieces_of, record_of


def test_what_does_not_fit_leaves_the_older_record_as_it_is() -> None:
    store = MemoryStore(1000)
    assert store.write([(key_of(1), pieces_of(1))]) == [None]
    (fault,) = store.write([(key_of(1), pieces_of(1, 2, 600))])
    assert fault is not None
    assert fault.kind == FaultKind.FULL
    assert bytes(store.read([Extent(key_of(1))])[0]) == record_of(1)


def test_a_replaced_record_gives_its_bytes_back() -> None:
    store = MemoryStore(1000)
    for seed in range(5):
        assert store.write([(key_of(1), pieces_of(1, seed=seed))]) == [None]
    assert store.num_bytes() == len(record_of(1))


def test_views_outlive_reads_and_the_record() -> None:
    store = MemoryStore()
    store.write([(key_of(n), pieces_of(n)) for n in (1, 2)])
    (first,) = store.read([Extent(key_of(1))])
    store.read([Extent(key_of(2))])
    store.delete([key_of(1)])
    store.close()
    assert bytes(first) == record_of(1)


def test_a_wiped_record_is_zeros_under_its_readers() -> None:
    store = MemoryStore()
    store.write([(key_of(1), pieces_of(1))])
    (view,) = store.read([Extent(key_of(1))])
    store.delete([key_of(1)], wipe=True)
    assert not any(view)
    assert view.readonly
