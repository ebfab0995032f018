"""An object store as a tier: on a folder, on memory, and on an S3 that errs, throttles and hangs."""

import builtins
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.breaker import Breaker
from kvwise.tiers.object import ObjectStore
from kvwise.tiers.record import read_header
from tests.tiers.s3_server import S3Server
from tests.tiers.samples import key_of, pieces_of, record_of

SOON_S = 0.08  # a deadline that tests wait for
SECRET = "VERYSECRET"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A bucket that s3://bucket leads to."""
    server = S3Server()
    settings = {"ENDPOINT_URL": server.endpoint, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    secrets = {"ACCESS_KEY_ID": f"{SECRET}ID", "SECRET_ACCESS_KEY": f"{SECRET}KEY"}
    for name, value in {**settings, **secrets}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., ObjectStore]]:
    """`connect(place)`: a store that is closed when the test ends."""
    stores: list[ObjectStore] = []

    def make(place: Any = "s3://bucket", **settings: Any) -> ObjectStore:
        stores.append(ObjectStore(place, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def put(store: ObjectStore, *numbers: int) -> None:
    assert store.write([(key_of(n), pieces_of(n)) for n in numbers]) == [None] * len(numbers)


def get(store: ObjectStore, *numbers: int) -> list[bytes | FaultKind]:
    answers = store.read([Extent(key_of(n)) for n in numbers])
    return [a.kind if isinstance(a, Fault) else bytes(a) for a in answers]


def kinds(faults: list[Fault | None]) -> list[FaultKind | None]:
    return [fault and fault.kind for fault in faults]


def path_of(number: int) -> str:
    digits = key_of(number).hex()
    return f"kvwise/{digits[:2]}/{digits}"


# -- S3


def test_s3_keeps_gives_lists_and_deletes(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect()
    put(store, 1, 2, 3)
    assert set(s3.objects) == {path_of(n) for n in (1, 2, 3)}
    record = record_of(1)
    spans = [
        (0, None),
        (64, 128),
        (len(record) - 5, None),
        (100, 1 << 20),
        (len(record), None),
        (1 << 20, 1 << 21),
        (7, 7),
    ]
    answers = store.read([Extent(key_of(1), start, stop) for start, stop in spans])
    assert [bytes(view) for view in answers] == [record[start:stop] for start, stop in spans]
    for start, stop in spans:  # and each by itself
        assert bytes(store.read([Extent(key_of(1), start, stop)])[0]) == record[start:stop]
        assert store.read([Extent(key_of(9), start, stop)]) == [Fault(FaultKind.MISSING)]
    assert get(store, 3, 9, 2) == [record_of(3), FaultKind.MISSING, record_of(2)]
    assert {read_header(view).key for view in store.scan()} == {key_of(n) for n in (1, 2, 3)}
    assert store.num_bytes() == sum(len(record_of(n)) for n in (1, 2, 3))
    assert store.delete([key_of(n) for n in (1, 9, 3, 1)]) == [None] * 4
    assert set(s3.objects) == {path_of(2)}


def test_a_purge_is_one_request_for_many(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect()
    put(store, *range(20))
    s3.requests.clear()
    assert store.delete([key_of(n) for n in range(20)]) == [None] * 20
    assert len(s3.requests) == 1
    assert s3.objects == {}


def test_segments_side_by_side_are_one_request(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect()
    pieces = pieces_of(1, 6, 100_000)
    assert store.write([(key_of(1), pieces), (key_of(2), pieces_of(2))]) == [None, None]
    record, header = b"".join(pieces), read_header(pieces[0])
    ranges = [header.segment_range(i) for i in range(6)]
    s3.requests.clear()
    extents = [Extent(key_of(1), *ranges[i]) for i in (2, 0, 1, 5)]
    answers = store.read([*extents, Extent(key_of(2), 64, 128)])
    assert [bytes(view) for view in answers[:4]] == [record[e.start : e.stop] for e in extents]
    assert bytes(answers[4]) == record_of(2)[64:128]
    assert len(s3.requests) == 3  # segments 0 to 2, segment 5, the other record


@pytest.mark.parametrize(
    ("status", "reading", "writing"),
    [
        (400, FaultKind.IO_ERROR, FaultKind.IO_ERROR),
        (401, FaultKind.IO_ERROR, FaultKind.IO_ERROR),
        (403, FaultKind.IO_ERROR, FaultKind.IO_ERROR),
        (404, FaultKind.MISSING, FaultKind.IO_ERROR),
        (409, FaultKind.IO_ERROR, FaultKind.IO_ERROR),
        (413, FaultKind.FULL, FaultKind.FULL),
    ],
)
def test_a_client_error_is_a_fault_at_once(
    s3: S3Server, connect: Callable[..., ObjectStore], status: int, reading: FaultKind, writing: FaultKind
) -> None:
    store = connect()
    put(store, 1)
    s3.status = status
    s3.requests.clear()
    assert get(store, 1) == [reading]
    assert kinds(store.write([(key_of(2), pieces_of(2))])) == [writing]
    assert len(s3.requests) == 2
    assert kinds(store.delete([key_of(1)])) == [None if status == 404 else reading]
    assert list(store.scan()) == []
    assert store.num_bytes() == 0
    s3.status = 0
    assert get(store, 1) == [record_of(1)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_within_the_deadline(
    s3: S3Server, connect: Callable[..., ObjectStore], status: int
) -> None:
    store = connect(timeout_s=SOON_S)
    s3.status = status
    (fault,) = store.read([Extent(key_of(1))])
    assert isinstance(fault, Fault)
    assert fault.kind in (FaultKind.IO_ERROR, FaultKind.LATE)
    assert 1 <= len(s3.requests) <= 4
    s3.status = 0
    store._timeout_s = 5.0
    assert get(store, 1) == [FaultKind.MISSING]


def test_a_server_that_recovers_in_time_is_no_fault(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect()
    put(store, 1)
    s3.status, busy = 503, len(s3.requests)
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.extend(get(store, 1)))
    reader.start()
    while len(s3.requests) == busy:
        time.sleep(0.001)
    s3.status = 0
    reader.join(10)
    assert got == [record_of(1)]


def test_a_server_that_hangs_is_late_and_opens_the_breaker(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect(timeout_s=SOON_S, max_concurrency=2)
    breaker = Breaker("object", VirtualClock())
    s3.hang = True
    for answer in store.read([Extent(key_of(n)) for n in range(6)]):
        assert isinstance(answer, Fault)
        assert answer.kind is FaultKind.LATE
        breaker.failure(answer)
    assert not breaker.allows()
    assert kinds(store.write([(key_of(1), pieces_of(1))])) == [FaultKind.LATE]
    assert kinds(store.delete([key_of(1), key_of(2)])) == [FaultKind.LATE] * 2
    assert list(store.scan()) == []
    assert s3.most_at_once <= 2
    s3.hang = False
    s3._ends.set()
    store._timeout_s = 5.0
    assert get(store, 1) == [FaultKind.MISSING]
    assert len(s3.requests) == 3  # what waited for its turn was dropped at its deadline


def test_no_server_at_all_is_an_error(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect(timeout_s=0.5)
    s3.close()
    assert get(store, 1)[0] in (FaultKind.IO_ERROR, FaultKind.LATE)


def test_requests_under_way_are_bounded(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect(max_concurrency=3)
    put(store, *range(40))
    assert get(store, *range(40)) == [record_of(n) for n in range(40)]
    assert s3.most_at_once <= 3


def test_no_secret_is_told_and_a_denial_is_said_once(
    s3: S3Server, connect: Callable[..., ObjectStore], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = connect()
    s3.status = 403
    faults = [*store.read([Extent(key_of(1))] * 3), *store.write([(key_of(2), pieces_of(2))])]
    assert {str(fault) for fault in faults} == {"i/o error: PermissionDeniedError, status 403"}
    assert [record.getMessage() for record in caplog.records] == ["object: it denies access"]
    assert SECRET not in " ".join([repr(store), repr(vars(store)), caplog.text])


def test_a_close_ends_calls_under_way(s3: S3Server, connect: Callable[..., ObjectStore]) -> None:
    store = connect(max_concurrency=1)
    s3.hang = True
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.extend(get(store, 1, 2, 3)))
    reader.start()
    while not s3.requests:
        time.sleep(0.001)
    store.close()
    s3._ends.set()
    reader.join(5)
    assert got == [FaultKind.OFF] * 3


# -- any backend


def test_a_huge_object_is_refused_before_it_is_received(connect: Callable[..., ObjectStore]) -> None:
    backend = MemoryStore()
    store = connect(backend, max_record_bytes=10_000)
    obstore.put(backend, path_of(1), bytes(1 << 20))
    put(store, 2)
    answers = store.read([Extent(key_of(1)), Extent(key_of(2)), Extent(key_of(1), 5, 1 << 30)])
    refused = Fault(FaultKind.CORRUPT, f"an object of {1 << 20} bytes, more than 10000")
    assert answers[0] == answers[2] == refused
    assert bytes(answers[1]) == record_of(2)
    assert kinds(store.write([(key_of(3), pieces_of(3, 2, 8000))])) == [FaultKind.FULL]


def test_a_scan_deletes_what_is_no_record_and_nothing_else(connect: Callable[..., ObjectStore]) -> None:
    backend = MemoryStore()
    store = connect(backend)
    put(store, 1, 2)
    flipped = bytearray(record_of(5))
    flipped[100] ^= 1
    for number, data in ((3, record_of(3)[:-64]), (9, record_of(4)), (5, bytes(flipped)), (6, b"x"), (7, b"")):
        obstore.put(backend, path_of(number), data)
    digits = key_of(8).hex()
    strangers = [
        f"kvwise/{digits}",
        f"kvwise/{digits[:2]}/{digits.upper()}",
        f"kvwise/xx/{digits}",
        "kvwise/note.txt",
        "other",
    ]
    for stranger in strangers:
        obstore.put(backend, stranger, b"mine")
    assert {read_header(view).key for view in store.scan()} == {key_of(1), key_of(2)}
    assert store.num_bytes() == len(record_of(1)) + len(record_of(2))
    left = {meta["path"] for meta in obstore.list(backend).collect()}
    assert left == {path_of(1), path_of(2), *strangers}


def test_a_scan_gives_long_headers(connect: Callable[..., ObjectStore]) -> None:
    store = connect("memory://")
    assert store.write([(key_of(1), pieces_of(1, 300, 10)), (key_of(2), pieces_of(2))]) == [None, None]
    assert {len(read_header(view).segments) for view in store.scan()} == {300, 2}


def test_one_that_cannot_be_deleted_does_not_take_its_neighbours_along(
    tmp_path: Path, connect: Callable[..., ObjectStore]
) -> None:
    store = connect(tmp_path.as_uri())
    put(store, 1, 3)
    (tmp_path / path_of(2)).mkdir(parents=True)
    assert kinds(store.delete([key_of(n) for n in (1, 2, 3)])) == [None, FaultKind.IO_ERROR, None]
    assert get(store, 1, 3) == [FaultKind.MISSING] * 2


def test_prefixes_part_stores(connect: Callable[..., ObjectStore]) -> None:
    backend = MemoryStore()
    stores = [connect(backend, prefix=prefix) for prefix in ("a", "a/b/", "/ab", "")]
    for number, store in enumerate(stores):
        put(store, number)
    for number, store in enumerate(stores):
        assert [read_header(view).key for view in store.scan()] == [key_of(number)]
        assert store.delete([key_of(n) for n in range(4) if n != number]) == [None] * 3
    assert [get(store, number) for number, store in enumerate(stores)] == [[record_of(n)] for n in range(4)]


def test_a_folder_that_goes_away_is_missing_and_may_come_back(
    tmp_path: Path, connect: Callable[..., ObjectStore]
) -> None:
    folder = tmp_path / "tier"
    store = connect(folder.as_uri())
    put(store, 1)
    shutil.rmtree(folder)
    assert get(store, 1) == [FaultKind.MISSING]
    assert list(store.scan()) == []
    assert store.delete([key_of(1)]) == [None]
    folder.write_text("a file in its place")
    assert get(store, 1)[0] in (FaultKind.MISSING, FaultKind.IO_ERROR)
    assert kinds(store.write([(key_of(1), pieces_of(1))])) == [FaultKind.IO_ERROR]
    folder.unlink()
    put(store, 1)
    assert get(store, 1) == [record_of(1)]


def test_it_says_that_it_cannot_wipe_and_whether_it_lasts(tmp_path: Path, connect: Callable[..., ObjectStore]) -> None:
    memory, folder = connect("memory://"), connect(tmp_path.as_uri())
    assert (memory.wipes, folder.wipes) == (False, False)
    assert (memory.persistent, folder.persistent) == (False, True)
    put(folder, 1)
    assert folder.delete([key_of(1)], wipe=True) == [None]
    assert get(folder, 1) == [FaultKind.MISSING]


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://user:sesame@h/x", "s3://", "file://relative"])
def test_a_url_that_cannot_be_used_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(UsageError, match="no object store can be opened") as refused:
        ObjectStore(url)
    assert "sesame" not in str(refused.value)


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"timeout_s": 0.0}, {"timeout_s": inf}, {"max_record_bytes": 0}, {"max_concurrency": 0}):
        with pytest.raises(UsageError, match="must be above 0"):
            ObjectStore("memory://", **settings)  # type: ignore[arg-type]


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "obstore" or name.startswith("obstore."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'kvwise\[object\]'"):
        ObjectStore("memory://")
