"""The disk tier against damage, refusals of the system, other processes, and folders that are not its own."""

import contextlib
import errno
import logging
import os
import pickle
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.disk.folder import MARKER, MARKER_TEXT
from kvwise.tiers.disk.segment import PAGE, pages, start_of
from kvwise.tiers.disk.system import System
from kvwise.tiers.record import pack_header, read_header, seal
from tests.tiers.disk_crash_worker import Worker
from tests.tiers.samples import header_of, is_sound, key_of, pieces_of, record_of

SIZE = 5000  # of the records here: two pages each


class Broken(System):
    """Fails as it is told to: `errors` maps a call's name to the error it raises; counts all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, int] = {}
        self.calls: list[tuple[str, int, int]] = []  # name, offset, bytes
        self.bad_ranges: list[tuple[int, int]] = []  # that cannot be read
        self.room: int | None = None  # bytes that can still be written to data

    def _note(self, name: str, offset: int = 0, num_bytes: int = 0) -> None:
        self.calls.append((name, offset, num_bytes))
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))

    def open(self, name: str, flags: int, folder: int) -> int:
        self._note("open")
        if flags & os.O_CREAT:
            self._note("create")
        if flags & os.O_DIRECT:
            self._note("open direct")
        return super().open(name, flags, folder)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._note("pwrite", offset, len(data))
        if self.room is not None:
            # A direct write is cut at a page, a buffered one anywhere.
            data = data[: self.room if "open direct" in self.errors else self.room // PAGE * PAGE]
            if not data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= len(data)
        return super().pwrite(fd, data, offset)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        length = sum(map(len, buffers))
        self._note("preadv", offset, length)
        if any(start < offset + length and offset < stop for start, stop in self.bad_ranges):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._note("fdatasync")
        super().fdatasync(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        self._note("ftruncate", length)
        super().ftruncate(fd, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._note("punch", offset, length)
        super().punch(fd, offset, length)

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def system() -> Broken:
    return Broken()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


@pytest.fixture
def store(folder: Path, system: Broken, clock: VirtualClock) -> Iterator[DiskStore]:
    with closing(DiskStore(folder, system=system, clock=clock)) as opened:
        yield opened


def put(store: DiskStore, *numbers: int, size: int = SIZE, seed: int = 0) -> None:
    assert store.write([(key_of(n), pieces_of(n, 2, size // 2, seed=seed)) for n in numbers]) == [None] * len(numbers)


def sample(number: int, size: int = SIZE, seed: int = 0) -> bytes:
    return record_of(number, 2, size // 2, seed=seed)


def kinds(store: DiskStore, *numbers: int) -> list[FaultKind | bool]:
    """For each record the kind of its fault, or whether its bytes are as written."""
    got = store.read([Extent(key_of(n)) for n in numbers])
    return [
        view.kind if isinstance(view, Fault) else bytes(view) == sample(n) for n, view in zip(numbers, got, strict=True)
    ]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("segment-*"))


def keys(store: DiskStore) -> list[bytes]:
    headers = [read_header(view) for view in store.scan()]
    assert not any(isinstance(header, Fault) for header in headers)
    return sorted(header.key for header in headers)


def written(folder: Path, *numbers: int) -> Path:
    """A closed store's only segment, with these records."""
    with closing(DiskStore(folder)) as store:
        put(store, *numbers)
    (segment,) = segments(folder)
    return segment


# What is on the medium


def test_the_start_of_a_record_is_where_this_tier_looks_for_it() -> None:
    header = header_of(3)
    packed = pack_header(header, [(100, bytes(16)), (70, bytes(16))])
    assert start_of(memoryview(packed)) == (read_header(packed).record_bytes, header.key)


def test_a_file_that_is_cut_anywhere_gives_misses_and_no_wrong_bytes(folder: Path) -> None:
    segment = written(folder, 1, 2, 3)
    content, slot = segment.read_bytes(), pages(len(sample(1)))
    assert len(content) == 3 * slot
    cuts = {*range(0, len(content), PAGE), 1, 63, 511, PAGE - 1, PAGE + 1, slot - 1, slot + 8, slot + 600, 3 * slot - 1}
    for cut in sorted(cuts):
        segment.write_bytes(content[:cut])
        with closing(DiskStore(folder)) as store:
            whole = [n for n in (1, 2, 3) if cut >= (n - 1) * slot + len(sample(n))]
            assert keys(store) == sorted(key_of(n) for n in whole), cut
            assert kinds(store, 1, 2, 3) == [n in whole or FaultKind.MISSING for n in (1, 2, 3)], cut
            assert store.num_bytes() == len(whole) * slot
            put(store, 7)  # and it is written on, behind what is left
            assert kinds(store, 7) == [True]
        assert len(segments(folder)) == 1
        for path in segments(folder):
            path.unlink()


def test_a_file_that_is_cut_while_it_is_open_gives_faults(folder: Path, store: DiskStore) -> None:
    put(store, 1, 2)
    os.truncate(segments(folder)[0], pages(len(sample(1))) + PAGE)
    assert kinds(store, 1, 2) == [True, FaultKind.CORRUPT]


def test_records_that_changed_places_are_not_served(folder: Path) -> None:
    segment = written(folder, 1, 2)
    content, slot = segment.read_bytes(), pages(len(sample(1)))
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2) == [True, True]
        segment.write_bytes(content[slot:] + content[:slot])  # behind the back of its index
        assert kinds(store, 1, 2) == [FaultKind.FOREIGN] * 2
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2) == [True, True]


def test_files_that_changed_names_are_not_served(folder: Path) -> None:
    with closing(DiskStore(folder, segment_bytes=PAGE)) as store:
        put(store, 1)
        put(store, 2)
        first, second = segments(folder)
        first.rename(folder / "aside")
        second.rename(first)
        (folder / "aside").rename(second)
        with contextlib.suppress(AssertionError):  # its open descriptors know better
            assert kinds(store, 1, 2) == [True, True]
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2) == [True, True]


def test_the_record_behind_a_damaged_header_is_found(folder: Path) -> None:
    segment = written(folder, 1, 2, 3)
    content = bytearray(segment.read_bytes())
    slot = pages(len(sample(1)))
    content[slot + 40] ^= 1
    segment.write_bytes(content)
    with closing(DiskStore(folder)) as store:
        assert keys(store) == sorted([key_of(1), key_of(3)])
        assert kinds(store, 1, 2, 3) == [True, FaultKind.MISSING, True]
        assert store.num_bytes() == 2 * slot
    assert segment.read_bytes()[slot : 2 * slot] == bytes(slot)  # what was damaged was handed back


def test_every_flipped_bit_on_the_medium_is_a_miss(folder: Path) -> None:
    segment = written(folder, 1)
    rng, record = np.random.default_rng(1), sample(1)
    content = segment.read_bytes()
    for position in [*range(0, 400, 3), *rng.integers(400, len(record), 60)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        segment.write_bytes(damaged)
        with closing(DiskStore(folder)) as store:
            (got,) = store.read([Extent(key_of(1))])
            assert isinstance(got, Fault) or not is_sound(got, 1)
        if not segment.exists():  # nothing in it was alive
            segment.touch()


def test_a_length_that_is_not_what_was_written_is_refused(folder: Path, store: DiskStore) -> None:
    put(store, 1)
    with segments(folder)[0].open("r+b") as file:
        record = bytearray(sample(1))
        record[16] ^= 64  # of the record's length
        file.write(record)
    assert kinds(store, 1) == [FaultKind.CORRUPT]


def test_a_record_in_the_body_of_a_dead_one_does_not_come_to_life(folder: Path, system: Broken) -> None:
    """Where holes cannot be dug, the body of a deleted record lies on: the tombstone says how far."""
    system.errors["punch"] = errno.EOPNOTSUPP
    first = pieces_of(1, 1, 20_000)
    body = bytes(PAGE - len(first[0])) + sample(2) + bytes(20_000)  # begins at a page
    with closing(DiskStore(folder, system=system)) as store:
        put(store, 3)
        assert store.write([(key_of(1), seal(header_of(1), [[body]]))]) == [None]
        assert store.delete([key_of(1)]) == [None]
    assert sample(2) in segments(folder)[0].read_bytes()
    with closing(DiskStore(folder, system=system)) as store:
        assert keys(store) == [key_of(3)]


@pytest.mark.parametrize("content", [b"", b"\x00" * 9000, pickle.dumps({"a": 1}) * 400, MARKER_TEXT, os.urandom(8192)])
def test_what_is_no_record_is_removed_from_a_segment(folder: Path, content: bytes) -> None:
    segment = written(folder, 1)
    segment.write_bytes(content)
    with closing(DiskStore(folder)) as store:
        assert keys(store) == []
        assert kinds(store, 1) == [FaultKind.MISSING]
        assert store.num_bytes() == 0
    assert segments(folder) == []


def test_a_sparse_segment_of_many_gigabytes_is_walked_over(folder: Path) -> None:
    segment = written(folder, 1, 2)
    os.truncate(segment, 1 << 40)
    os.utime(segment, (0, 0))
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2) == [True, True]
        put(store, 3)
        assert kinds(store, 3) == [True]


# Folders


def test_the_root_of_the_file_system_is_refused() -> None:
    for path in ("/", "//", "/tmp/.."):
        with pytest.raises(UsageError, match="root of the file system"):
            DiskStore(path)


def test_a_folder_of_others_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="name an empty or a new folder"):
        DiskStore(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_link_a_file_or_a_pipe_is_no_folder(tmp_path: Path, folder: Path) -> None:
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "link/", "link/.", "file", "pipe"):
        with pytest.raises(UsageError, match="real folder"):
            DiskStore(f"{tmp_path}/{name}")
    assert list(folder.iterdir()) == []


def test_another_version_is_refused_and_a_marker_cut_short_is_mended(folder: Path) -> None:
    segment = written(folder, 1)
    for cut in (0, 5, len(MARKER_TEXT)):
        (folder / MARKER).write_bytes(MARKER_TEXT[:cut])
        with closing(DiskStore(folder)) as store:
            assert kinds(store, 1) == [True]
        assert (folder / MARKER).read_bytes() == MARKER_TEXT
    for other in (b"kvwise disk tier, format 2\n", MARKER_TEXT + b"?", b"\x00"):
        (folder / MARKER).write_bytes(other)
        with pytest.raises(UsageError, match="name another folder"):
            DiskStore(folder)
    (folder / MARKER).unlink()
    (folder / MARKER).symlink_to(segment)
    with pytest.raises(UsageError):
        DiskStore(folder)


def test_what_is_no_segment_is_never_opened_nor_removed(folder: Path, tmp_path: Path) -> None:
    written(folder, 1).rename(tmp_path / "outside")
    outside = (tmp_path / "outside").read_bytes()

    def name(number: int) -> Path:
        return folder / f"segment-{number:016x}-00000001.kv"

    os.mkfifo(name(1))
    name(2).symlink_to(tmp_path / "outside")
    name(3).mkdir()
    os.link(tmp_path / "outside", name(4))
    with contextlib.suppress(OSError):
        os.mknod(name(5), stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    (folder / "notes").write_text("mine")
    (folder / "segment-1.kv").write_text("mine too")
    before = sorted(folder.iterdir())
    with closing(DiskStore(folder)) as store:
        assert keys(store) == []
        assert kinds(store, 1) == [FaultKind.MISSING]
        put(store, 1)
        assert kinds(store, 1) == [True]
        store.delete([key_of(1)], wipe=True)
    assert sorted(folder.iterdir()) == before
    assert (tmp_path / "outside").read_bytes() == outside


def test_a_deleted_file_is_missing_at_once_and_is_not_looked_for_again(
    folder: Path, system: Broken, store: DiskStore
) -> None:
    put(store, 1, 2)
    assert kinds(store, 1) == [True]
    segments(folder)[0].unlink()
    assert kinds(store, 1, 2) == [FaultKind.MISSING] * 2
    assert store.num_bytes() == 0
    system.calls.clear()
    for _ in range(20):
        assert kinds(store, 1, 2) == [FaultKind.MISSING] * 2
    assert system.calls == []
    put(store, 3)
    assert kinds(store, 3) == [True]


def test_a_removed_folder_switches_the_tier_off(
    folder: Path, system: Broken, store: DiskStore, clock: VirtualClock, tmp_path: Path
) -> None:
    put(store, 1)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)  # what comes in its place is not ours
    assert kinds(store, 1) == [FaultKind.MISSING]
    for _ in range(20):
        (fault,) = store.write([(key_of(2), pieces_of(2))])
        assert fault is not None
        assert fault.kind == FaultKind.OFF
    assert system.count("create") <= 3  # the marker, the segment, one more try
    clock.advance(1.0)
    assert store.write([(key_of(2), pieces_of(2))])[0].kind == FaultKind.OFF
    assert store.delete([key_of(1), key_of(2)], wipe=True) == [None, None]
    assert keys(store) == []
    assert [path.name for path in tmp_path.iterdir()] == ["tier"]


# A system that says no


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("pwrite", errno.ENOSPC, FaultKind.FULL),
        ("pwrite", errno.EDQUOT, FaultKind.FULL),
        ("pwrite", errno.EFBIG, FaultKind.FULL),
        ("pwrite", errno.EIO, FaultKind.IO_ERROR),
        ("create", errno.EROFS, FaultKind.FULL),
        ("create", errno.EACCES, FaultKind.FULL),
        ("create", errno.ENOSPC, FaultKind.FULL),
        ("create", errno.EMFILE, FaultKind.IO_ERROR),
        ("fdatasync", errno.EIO, FaultKind.IO_ERROR),
        ("fdatasync", errno.ENOSPC, FaultKind.FULL),
    ],
)
def test_a_refused_write_keeps_nothing_and_is_tried_again_later(
    folder: Path,
    system: Broken,
    clock: VirtualClock,
    caplog: pytest.LogCaptureFixture,
    name: str,
    number: int,
    kind: FaultKind,
) -> None:
    with closing(DiskStore(folder, system=system, clock=clock, segment_bytes=4 * PAGE)) as store:
        put(store, 1, 2)
        system.errors[name] = number
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                faults = store.write([(key_of(n), pieces_of(n, 2, SIZE // 2)) for n in (3, 4)])
                assert [fault and fault.kind for fault in faults] == [kind] * 2
        assert len(caplog.records) == 1
        assert system.count("create") == 3  # the marker, the first segment, one try
        assert kinds(store, 1, 2, 3, 4) == [True, True, FaultKind.MISSING, FaultKind.MISSING]
        assert store.num_bytes() == 2 * pages(len(sample(1)))
        system.errors.clear()
        assert store.write([(key_of(3), pieces_of(3, 2, SIZE // 2))])[0].kind == kind  # it rests
        clock.advance(1.0)
        put(store, 3)
        assert kinds(store, 1, 2, 3) == [True] * 3
    with closing(DiskStore(folder)) as store:
        assert keys(store) == sorted(key_of(n) for n in (1, 2, 3))
        assert len(segments(folder)) == 2


def test_the_rest_between_tries_grows_and_ends_with_success(
    store: DiskStore, system: Broken, clock: VirtualClock
) -> None:
    put(store, 1)
    system.errors["pwrite"] = errno.EIO
    tried = []
    for second in range(200):
        before = system.count("pwrite")
        store.write([(key_of(2), pieces_of(2))])
        if system.count("pwrite") > before:
            tried.append(second)
        clock.advance(1.0)
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    system.errors.clear()
    clock.advance(60.0)
    put(store, 2)
    system.errors["pwrite"] = errno.EIO
    store.write([(key_of(3), pieces_of(3))])
    system.errors.clear()
    clock.advance(1.0)
    put(store, 3)


@pytest.mark.parametrize("refuse", [{}, {"open direct": errno.EINVAL}])
def test_what_fits_is_kept_and_room_that_is_made_is_used_at_once(
    store: DiskStore, system: Broken, refuse: dict[str, int]
) -> None:
    system.errors |= refuse
    slot = pages(len(sample(1)))
    for room in (0, 100, PAGE, slot, slot + PAGE, slot + PAGE + 9, 3 * slot - 1):
        put(store, 9)
        system.room = room
        faults = store.write([(key_of(n), pieces_of(n, 2, SIZE // 2)) for n in (1, 2, 3)])
        kept = room // slot
        assert [fault and fault.kind for fault in faults] == [None] * kept + [FaultKind.FULL] * (3 - kept), room
        assert kinds(store, 1, 2, 3) == [True] * kept + [FaultKind.MISSING] * (3 - kept), room
        assert store.num_bytes() == (kept + 1) * slot
        system.room = None
        store.delete([key_of(9)])  # makes room: writing goes on without waiting
        put(store, 1, 2, 3)
        assert kinds(store, 1, 2, 3) == [True] * 3
        store.delete([key_of(n) for n in (1, 2, 3)])


def test_a_disk_that_is_really_full(tmp_path: Path, clock: VirtualClock) -> None:
    """A file system of 1 MiB: what fits is served, what does not is refused, and deleting makes room."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with closing(DiskStore(mount, clock=clock)) as store:
            kept: list[int] = []
            for start in range(0, 400, 8):
                numbers = range(start, start + 8)
                faults = store.write([(key_of(n), pieces_of(n, 2, SIZE // 2)) for n in numbers])
                assert {fault.kind for fault in faults if fault} <= {FaultKind.FULL}
                kept += [n for n, fault in zip(numbers, faults, strict=True) if fault is None]
            assert 100 <= len(kept) < 130
            assert kinds(store, *kept) == [True] * len(kept)
            assert store.delete([key_of(n) for n in kept[:50]], wipe=True) == [None] * 50
            put(store, *range(1000, 1040))
            assert kinds(store, *kept[50:], *range(1000, 1040)) == [True] * (len(kept) - 10)
            used = sum(path.stat().st_blocks * 512 for path in segments(mount))
            assert used == store.num_bytes() == (len(kept) - 10) * pages(len(sample(1)))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_limit_of_a_process_is_a_full_disk(folder: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: the write is cut in the middle of a record."""
    script = f"""
        import resource, sys
        from kvwise.tiers.disk import DiskStore
        from tests.tiers.samples import key_of, pieces_of
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * {PAGE},) * 2)
        store = DiskStore(sys.argv[1])
        faults = store.write([(key_of(n), pieces_of(n, 2, {SIZE // 2})) for n in (1, 2, 3)])
        print([fault and fault.kind.name for fault in faults])
        store.close()
    """
    done = run(script, folder)
    assert done == "[None, None, 'FULL']"
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2, 3) == [True, True, FaultKind.MISSING]
        assert segments(folder)[0].stat().st_size == 2 * pages(len(sample(1)))


def test_a_bad_spot_takes_no_neighbour_along_and_is_left_alone(
    store: DiskStore, system: Broken, clock: VirtualClock
) -> None:
    put(store, 1, 2, 3)
    slot = pages(len(sample(1)))
    system.bad_ranges = [(slot + PAGE, slot + PAGE + 1)]
    assert kinds(store, 1, 2, 3) == [True, FaultKind.IO_ERROR, True]
    calls = system.count("preadv")
    for _ in range(10):
        assert kinds(store, 2) == [FaultKind.IO_ERROR]
    assert system.count("preadv") == calls
    system.bad_ranges = []
    assert kinds(store, 2) == [FaultKind.IO_ERROR]
    clock.advance(60.0)
    assert kinds(store, 2) == [True]
    system.bad_ranges = [(0, PAGE)]
    assert kinds(store, 1) == [FaultKind.IO_ERROR]
    put(store, 1)  # written anew, it is elsewhere
    assert kinds(store, 1) == [True]


def test_what_cannot_be_read_at_start_is_missing_but_not_removed(folder: Path, system: Broken) -> None:
    written(folder, 1, 2, 3)
    slot = pages(len(sample(1)))
    system.bad_ranges = [(slot, slot + PAGE)]
    with closing(DiskStore(folder, system=system)) as store:
        assert kinds(store, 1, 2, 3) == [True, FaultKind.MISSING, True]
        store.delete([key_of(1), key_of(3)])
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2, 3) == [FaultKind.MISSING, True, FaultKind.MISSING]


def test_a_deletion_that_fails_is_told_and_its_bytes_still_count(store: DiskStore, system: Broken) -> None:
    put(store, 1, 2)
    system.errors["pwrite"] = errno.EROFS
    (fault,) = store.delete([key_of(1)])
    assert fault is not None
    assert fault.kind == FaultKind.FULL
    assert kinds(store, 1, 2) == [FaultKind.MISSING, True]
    assert store.num_bytes() == 2 * pages(len(sample(1)))


def test_without_direct_reads_it_goes_through_the_page_cache(folder: Path, system: Broken) -> None:
    system.errors["open direct"] = errno.EINVAL
    with closing(DiskStore(folder, system=system)) as store:
        put(store, 1, 2)
        assert kinds(store, 1, 2) == [True, True]
    with closing(DiskStore(folder, system=system)) as store:
        assert kinds(store, 1, 2) == [True, True]


def test_without_holes_space_comes_back_with_the_file(folder: Path, system: Broken) -> None:
    system.errors["punch"] = errno.EOPNOTSUPP
    slot = pages(len(sample(1)))
    with closing(DiskStore(folder, system=system)) as store:
        put(store, 1, 2, 3)
        store.delete([key_of(2)], wipe=True)
        assert kinds(store, 1, 2, 3) == [True, FaultKind.MISSING, True]
        assert store.num_bytes() == 3 * slot  # the truth about the medium
    with closing(DiskStore(folder, system=system)) as store:
        assert keys(store) == sorted([key_of(1), key_of(3)])
        store.delete([key_of(1), key_of(3)], wipe=True)
        assert store.num_bytes() == 0
        assert segments(folder) == []


def test_wiping_writes_zeros_and_waits_before_the_record_is_declared_dead(store: DiskStore, system: Broken) -> None:
    put(store, 1, 2, size=12000)
    system.calls.clear()
    assert store.delete([key_of(1)], wipe=True) == [None]
    changes = [(name, offset, size) for name, offset, size in system.calls if name in ("pwrite", "fdatasync", "punch")]
    slot = pages(len(sample(1, 12000)))
    zeros, sync, stone, hole = (
        ("pwrite", PAGE, slot - PAGE),
        ("fdatasync", 0, 0),
        ("pwrite", 0, PAGE),
        ("punch", 0, slot),
    )
    assert changes == [zeros, sync, stone, sync, hole]
    system.errors["fdatasync"] = errno.EIO
    assert store.delete([key_of(2)], wipe=True)[0].kind == FaultKind.IO_ERROR


# Bytes, files, descriptors


def test_bytes_on_the_medium_are_those_that_are_told(folder: Path, store: DiskStore) -> None:
    rng = np.random.default_rng(3)
    alive: dict[int, int] = {}
    for _ in range(30):
        numbers = [int(n) for n in rng.integers(0, 20, 3)]
        for number in numbers:
            size = int(rng.integers(100, 40_000))
            put(store, number, size=size)
            alive[number] = size
        gone = int(rng.integers(0, 20))
        store.delete([key_of(gone)], wipe=bool(rng.integers(2)))
        alive.pop(gone, None)
        assert store.num_bytes() == sum(pages(len(sample(n, size))) for n, size in alive.items())
    store.close()
    # A page or two of each file may be the file system's own, for its list of extents.
    blocks = sum(path.stat().st_blocks * 512 for path in segments(folder))
    with closing(DiskStore(folder)) as again:
        assert blocks - 3 * PAGE <= again.num_bytes() <= blocks
        for number, size in alive.items():
            assert bytes(again.read([Extent(key_of(number))])[0]) == sample(number, size)


def test_records_larger_than_the_staging_memory_or_a_segment(folder: Path) -> None:
    with closing(DiskStore(folder, segment_bytes=1 << 20)) as store:
        put(store, 1, 2, size=9 << 20)
        put(store, 3)
        got = store.read([Extent(key_of(n)) for n in (2, 3, 1)])
        assert [bytes(view) for view in got] == [sample(2, 9 << 20), sample(3), sample(1, 9 << 20)]
        assert len(segments(folder)) == 3


def test_files_in_which_nothing_lives_are_removed(folder: Path) -> None:
    with closing(DiskStore(folder, segment_bytes=4 * PAGE)) as store:
        for n in range(8):
            put(store, n)
        assert len(segments(folder)) == 4
        store.delete([key_of(n) for n in (0, 1, 2)], wipe=True)
        assert len(segments(folder)) == 3
        store.delete([key_of(n) for n in range(3, 8)])
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_half_empty_segment_is_written_on_after_a_restart(folder: Path) -> None:
    for n in range(5):
        with closing(DiskStore(folder)) as store:
            put(store, n)
    assert len(segments(folder)) == 1
    with closing(DiskStore(folder)) as store:
        assert kinds(store, *range(5)) == [True] * 5


def test_descriptors_are_bounded(folder: Path) -> None:
    with closing(DiskStore(folder, segment_bytes=PAGE)) as store:
        before = len(os.listdir("/proc/self/fd"))
        for n in range(150):
            put(store, n)
        assert kinds(store, *range(150)) == [True] * 150
        store.delete([key_of(n) for n in range(0, 150, 2)])
        assert len(os.listdir("/proc/self/fd")) - before <= 66
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_descriptors_left_is_a_fault_of_those_items(store: DiskStore, system: Broken) -> None:
    put(store, 1)
    system.errors["open"] = errno.EMFILE
    assert kinds(store, 1) == [FaultKind.IO_ERROR]
    system.errors.clear()
    put(store, 1)
    assert kinds(store, 1) == [True]


def test_a_fork_is_noticed(store: DiskStore) -> None:
    put(store, 1)
    child = os.fork()
    if child == 0:
        try:
            store.read([Extent(key_of(1))])
        except UsageError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert kinds(store, 1) == [True]


# Several at once


def test_two_at_once_see_each_others_records(folder: Path, clock: VirtualClock) -> None:
    with closing(DiskStore(folder, clock=clock)) as one, closing(DiskStore(folder, clock=clock)) as two:
        put(one, 1, 2)
        put(two, 3)
        assert kinds(one, 1, 2, 3) == [True] * 3
        assert kinds(two, 1, 2, 3, 9) == [True] * 3 + [FaultKind.MISSING]
        put(one, 4)
        assert kinds(two, 4) == [FaultKind.MISSING]  # it looked a moment ago
        clock.advance(1.0)
        assert kinds(two, 4) == [True]
        put(two, 5)
        assert [read_header(view).key for view in one.refresh()] == [key_of(5)]
        assert two.delete([key_of(1)], wipe=True) == [None]
        assert kinds(one, 1, 2) == [FaultKind.MISSING, True]
        assert one.num_bytes() == two.num_bytes() == 4 * pages(len(sample(1)))
        assert len(segments(folder)) == 2


def test_a_file_that_another_process_appended_to_is_not_removed(folder: Path, clock: VirtualClock) -> None:
    with closing(DiskStore(folder, clock=clock)) as one:
        with closing(DiskStore(folder, clock=clock)) as two:
            put(two, 1)
            assert kinds(one, 1) == [True]
            put(two, 2)
        assert one.delete([key_of(1)]) == [None]  # all that it knows of in that file
    with closing(DiskStore(folder)) as store:
        assert kinds(store, 1, 2) == [FaultKind.MISSING, True]


def test_of_two_copies_the_one_stored_last_stays(folder: Path) -> None:
    """Two processes stored the same key; a wipe in one of them finds both."""
    old = seal(header_of(1), [[b"old" * 2000]])
    new = seal(header_of(1, stored_at=1.5e9), [[b"new" * 2000]])
    for first, second in ((old, new), (new, old)):
        with closing(DiskStore(folder)) as one, closing(DiskStore(folder)) as two:
            assert one.num_bytes() == two.num_bytes() == 0
            assert one.write([(key_of(1), first)]) == two.write([(key_of(1), second)]) == [None]
            assert bytes(one.read([Extent(key_of(1))])[0]) == b"".join(first)
        with closing(DiskStore(folder)) as store:
            assert set(keys(store)) == {key_of(1)}
            assert bytes(store.read([Extent(key_of(1))])[0]) == b"".join(new)
            assert store.num_bytes() == pages(len(b"".join(new)))
        with closing(DiskStore(folder)) as one, closing(DiskStore(folder)) as two:
            assert one.num_bytes() == pages(len(b"".join(new)))
            assert two.write([(key_of(1), old)]) == [None]
            assert one.delete([key_of(1)], wipe=True) == [None]
            assert [view.kind for view in one.read([Extent(key_of(1))])] == [FaultKind.MISSING]
            assert [view.kind for view in two.read([Extent(key_of(1))])] == [FaultKind.MISSING]
        assert segments(folder) == []


def run(script: str, *arguments: object) -> str:
    """What a Python process prints that runs this script."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    return done.stdout.strip()


def test_two_processes_on_one_folder(folder: Path) -> None:
    """Both write, read, delete and reopen at random; neither ever reads a byte that its key does not say."""
    with closing(Worker(folder)) as one, closing(Worker(folder)) as two:
        one.start(1, 60)
        two.start(2, 60)
        assert [one.end(), two.end()] == [0, 0]
    with closing(DiskStore(folder)) as store:
        found = [read_header(view) for view in store.scan()]
        slots = {header.key: pages(header.record_bytes) for header in found}
        assert len(slots) > 3
        assert store.num_bytes() == sum(slots.values())
        got = store.read([Extent(key) for key in slots])
        numbers = {header.key: header.depth for header in found}
        assert all(is_sound(view, numbers[key]) for key, view in zip(slots, got, strict=True))


def scattered(store: DiskStore, numbers: list[int], read: Callable[[list[Extent]], list[memoryview | Fault]]) -> bool:
    got = read([Extent(key_of(n)) for n in numbers])
    return all(bytes(view) == sample(n) for n, view in zip(numbers, got, strict=True))


def test_neighbours_are_read_in_one_go(store: DiskStore, system: Broken) -> None:
    put(store, *range(40))
    system.calls.clear()
    assert scattered(store, list(range(40)), store.read)
    assert system.count("preadv") == 1
    system.calls.clear()
    assert scattered(store, [30, 2, 17, 2], store.read)
    assert system.count("preadv") == 3
