"""Every ByteStore the contract suite runs over: add a function and an entry of STORES for each new one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvwise.tiers.base import ByteStore
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.host import HostStore
from kvwise.tiers.memory_store import MemoryStore
from kvwise.tiers.object import ObjectStore
from kvwise.tiers.record import ALIGNMENT
from kvwise.tiers.redis import RedisStore
from tests.tiers.redis_server import shared_server


@dataclass
class Opened:
    """A fresh, empty store, and what the suite may do to it beyond its interface; None where that makes no sense."""

    store: ByteStore
    reopen: Callable[[], ByteStore] | None = None  # after close: the same records, for a store that is persistent
    medium: Callable[[], bytes] | None = None  # all bytes that lie on the medium now, to see what a wipe left of them


# Called with an empty folder and a capacity in bytes (None: as much as it likes). It may call pytest.skip(reason).
# A store that cannot refuse what is too large ignores the capacity and is named in UNBOUNDED.
Factory = Callable[[Path, int | None], AbstractContextManager[Opened]]


@contextmanager
def memory(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    store = MemoryStore(capacity_bytes)
    yield Opened(store)
    store.close()


@contextmanager
def redis(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    server = shared_server()
    server.say("FLUSHALL")
    stores = [RedisStore(server.url)]

    def reopen() -> ByteStore:
        stores.append(RedisStore(server.url))
        return stores[-1]

    yield Opened(stores[0], reopen)
    for store in stores:
        store.close()


@contextmanager
def disk(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    stores = [DiskStore(folder)]

    def reopen() -> ByteStore:
        stores.append(DiskStore(folder))
        return stores[-1]

    yield Opened(stores[0], reopen, lambda: b"".join(path.read_bytes() for path in sorted(folder.iterdir())))
    for store in stores:
        store.close()


@contextmanager
def host(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    store = HostStore(capacity_bytes or 1 << 20)
    yield Opened(store, medium=lambda: bytes(store._memory))
    store.check()
    store.close()


@contextmanager
def crumbled(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    """A host store whose free room lies in runs of 64 bytes: no record lies in one piece."""
    store = HostStore(2 * (capacity_bytes or 1 << 20))
    (whole,) = store._space.take(store.capacity_bytes)
    crumbs = [(start, start + ALIGNMENT) for start in range(*whole, ALIGNMENT)]
    store._space.give_back(crumbs[::2])
    yield Opened(store, medium=lambda: bytes(store._memory))
    if not store._closed:
        store._space.give_back(crumbs[1::2])
    store.check()
    store.close()


@contextmanager
def object_in_memory(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    store = ObjectStore("memory://")
    yield Opened(store)
    store.close()


@contextmanager
def object_in_folder(folder: Path, capacity_bytes: int | None) -> Iterator[Opened]:
    stores = [ObjectStore(folder.as_uri())]

    def reopen() -> ByteStore:
        stores.append(ObjectStore(folder.as_uri()))
        return stores[-1]

    yield Opened(stores[0], reopen)
    for store in stores:
        store.close()


STORES: dict[str, Factory] = {
    "memory": memory,
    "host": host,
    "host-crumbled": crumbled,
    "redis": redis,
    "disk": disk,
    "object-memory": object_in_memory,
    "object-folder": object_in_folder,
}
UNBOUNDED: set[str] = {"redis", "disk", "object-memory", "object-folder"}
