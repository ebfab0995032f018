"""Records in an object store (S3, GCS, Azure, a folder, memory): one object each, through obstore."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import timedelta
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.heads import HEAD_BYTES, MAX_HEAD_BYTES, is_cut
from kvwise.tiers.record import read_header

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Backend

A = TypeVar("A")
R = TypeVar("R")

_log = logging.getLogger(__name__)

_GAP_BYTES = 64 << 10  # ranges of a record that are closer are one request
_LISTED = 256  # objects of one step of a scan
_DELETED = 256  # objects of one request
_MAX_RETRIES = 3
_FULL = re.compile(r"status code: (413|507)|os error (28|30|122)\b|StorageFull|QuotaExceeded")  # ENOSPC, EROFS, EDQUOT
_LATE = re.compile(r"kind: Timeout|[Tt]imed ?[Oo]ut")
_BEHIND = re.compile(r"status code: 416|StartTooLarge|InvalidRange")
_STATUS = re.compile(r"status code: (\d{3})")
_REFUSED = {"UnauthenticatedError": "it does not accept the credentials", "PermissionDeniedError": "it denies access"}


class ObjectStore:
    """A `ByteStore` of objects named `prefix` + two hex digits + "/" + the key's 64 hex digits.

    `place` is s3://bucket/path, gs://..., az://account/container/path, file:///folder or memory://, or a store that
    obstore made (with its own credentials, retries and timeouts). From a URL, credentials are found as obstore finds
    them; 5xx, 429 and broken connections are tried again with back-off, at most three times and not past the deadline.

    `timeout_s` is the deadline of one call, whatever the number of its items, of which `max_concurrency` are under
    way at once: what is not done by then is LATE. A request that hangs keeps one of these places until obstore's own
    timeout (30 s), and what waits for a place is dropped at its deadline, so that nothing piles up. A write that is
    late may still arrive; it is whole, and a scan finds it. An object of more than `max_record_bytes` is refused
    before it is received, and never written.

    An object store cannot overwrite bytes in place, and may keep versions: `wipes` is False, and `delete(wipe=True)`
    only deletes. Nor does it forget by itself: what has expired is deleted from above, or by a rule of the bucket.
    """

    wipes = False

    def __init__(
        self,
        place: "str | Backend",
        *,
        prefix: str = "kvwise/",
        timeout_s: float = 10.0,
        max_record_bytes: int = 64 << 20,
        max_concurrency: int = 8,
        name: str = "object",
    ) -> None:
        if not 0 < timeout_s < inf or max_record_bytes < 1 or max_concurrency < 1:
            raise UsageError(
                f"{name}: timeout_s={timeout_s:g}, max_record_bytes={max_record_bytes} and"
                f" max_concurrency={max_concurrency} must be above 0"
            )
        self.name = name
        self._timeout_s = timeout_s
        self._max_bytes = max_record_bytes
        self._prefix = "".join(part + "/" for part in prefix.split("/") if part)
        self._backend = _Backend(place, name, timeout_s)
        self.persistent = self._backend.persistent
        self._workers = ThreadPoolExecutor(max_concurrency, thread_name_prefix=f"kvwise-{name}")
        self._closed = False
        self._said: set[str] = set()
        self._mutex = Lock()

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        """See `ByteStore.write`. An object appears whole or not at all."""
        return self._each(self._put, records, self._deadline())

    def read(self, extents: Sequence[Extent]) -> list[memoryview | Fault]:
        """See `ByteStore.read`. Extents of one record that lie close together are one request. Views stay valid."""
        hulls = _hulls(extents)
        answers = self._each(self._get, [hull.extent for hull in hulls], self._deadline())
        out: list[memoryview | Fault] = [Fault(FaultKind.MISSING)] * len(extents)
        for hull, got in zip(hulls, answers, strict=True):
            for i in hull.members:
                start, stop = extents[i].start - hull.extent.start, extents[i].stop
                end = None if stop is None else max(stop - hull.extent.start, start)
                out[i] = got if isinstance(got, Fault) else got[start:end]
        return out

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        """See `ByteStore.delete`; `wipe` cannot be had (`wipes`)."""
        deadline = self._deadline()
        batches = [keys[start : start + _DELETED] for start in range(0, len(keys), _DELETED)]
        done = self._each(self._delete, batches, deadline)
        faults = [done[i // _DELETED] for i in range(len(keys))]
        # Some stores stop at the first that is absent or refused: then one by one.
        again = [i for i, fault in enumerate(faults) if fault and len(keys) > 1]
        for i, fault in zip(again, self._each(self._delete, [[keys[i]] for i in again], deadline), strict=True):
            faults[i] = fault
        return [None if fault and fault.kind is FaultKind.MISSING else fault for fault in faults]

    def scan(self) -> Iterator[memoryview]:
        """See `ByteStore.scan`. Only objects named as a record would be are looked at, and deleted if they are none.

        Ends early, with a line in the log, when the store fails.
        """
        for found in self._steps():
            bad = []
            heads = self._each(self._head, [each.key for each in found], self._deadline())
            for (key, num_bytes), head in zip(found, heads, strict=True):
                if isinstance(head, Fault):
                    continue
                header = read_header(head)
                if isinstance(header, Fault) or header.record_bytes != num_bytes or header.key != key:
                    bad.append(key)
                else:
                    yield head
            if bad:
                _log.warning("%s: %d objects under its prefix are no records: deleted", self.name, len(bad))
                self.delete(bad)

    def num_bytes(self) -> int:
        """Bytes of all records; of those that could be listed if the store fails meanwhile. Lists all objects."""
        return sum(found.num_bytes for step in self._steps() for found in step)

    def close(self) -> None:
        """Further calls answer with OFF; the objects stay, but for memory://."""
        self._closed = True
        self._workers.shutdown(wait=False, cancel_futures=True)

    # -- names

    def _path(self, key: bytes) -> str:
        digits = key.hex()
        return f"{self._prefix}{digits[:2]}/{digits}"

    def _key(self, path: str) -> bytes | None:
        """The key of an object that is named as a record would be."""
        digits = path.rpartition("/")[2]
        if not re.fullmatch("[0-9a-f]{64}", digits):
            return None
        key = bytes.fromhex(digits)
        return key if self._path(key) == path else None

    # -- jobs, each on a thread of its own

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _each(self, job: Callable[[A], R | Fault], items: Sequence[A], deadline: float) -> list[R | Fault]:
        """Do the job on all items, a few at once."""
        futures: list[Future[R | Fault]] = []
        try:
            futures += [self._workers.submit(self._guarded, job, item) for item in items]
            return [future.result(max(0.0, deadline - time.monotonic())) for future in futures]
        except TimeoutError:
            return [_done_or(future, Fault(FaultKind.LATE, "not done before the deadline")) for future in futures]
        except (RuntimeError, CancelledError):
            if self._closed:
                return [self._off() for _ in items]
            raise

    def _guarded(self, job: Callable[[A], R | Fault], item: A) -> R | Fault:
        try:
            return job(item)
        except FileNotFoundError:
            return Fault(FaultKind.MISSING)
        except self._backend.errors as error:
            return self._fault(error)
        except BaseException as error:  # obstore's Rust may panic; its exception cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            return self._fault(error)

    def _put(self, record: tuple[bytes, Sequence[Buffer]]) -> Fault | None:
        import obstore

        # One copy at the start: a request that outlives the deadline must not read the caller's memory.
        key, data = record[0], b"".join(record[1])
        if len(data) > self._max_bytes:
            return Fault(FaultKind.FULL, f"{len(data)} bytes, at most {self._max_bytes} are taken")
        try:
            obstore.put(self._backend.store, self._path(key), data, use_multipart=False)
        except FileNotFoundError:
            return Fault(FaultKind.IO_ERROR, "no such bucket, container or folder")
        return None

    def _get(self, extent: Extent) -> memoryview | Fault:
        import obstore

        path, (_, start, stop) = self._path(extent.key), extent
        if stop is not None and stop <= start:
            obstore.head(self._backend.store, path)
            return memoryview(b"")
        span: Any = (start, stop) if stop is not None else {"offset": start}
        try:
            got = obstore.get(self._backend.store, path, options={"range": span} if start or stop else None)
        except self._backend.errors as error:
            if isinstance(error, FileNotFoundError) or not _BEHIND.search(str(error)):
                raise
            return memoryview(b"")
        if got.meta["size"] > self._max_bytes:
            return Fault(FaultKind.CORRUPT, f"an object of {got.meta['size']} bytes, more than {self._max_bytes}")
        return memoryview(got.bytes())

    def _delete(self, keys: Sequence[bytes]) -> Fault | None:
        import obstore

        obstore.delete(self._backend.store, [self._path(key) for key in dict.fromkeys(keys)])
        return None

    def _head(self, key: bytes) -> memoryview | Fault:
        head = self._get(Extent(key, 0, HEAD_BYTES))
        if isinstance(head, Fault) or not is_cut(head):
            return head
        return self._get(Extent(key, 0, MAX_HEAD_BYTES))

    def _steps(self) -> Iterator[list["_Found"]]:
        """All records by their names, in batches."""
        import obstore

        if self._closed:
            return
        stream = iter(obstore.list(self._backend.store, self._prefix or None, chunk_size=_LISTED))
        while True:
            (step,) = self._each(lambda stream: next(stream, ()), [stream], self._deadline())
            if isinstance(step, Fault):
                if not self._closed and step.kind is not FaultKind.MISSING:  # a folder that nothing was written to
                    _log.warning("%s: not all of it was looked at: %s", self.name, step)
                return
            if not step:
                return
            named = [(self._key(meta["path"]), meta["size"]) for meta in step]
            yield [_Found(key, size) for key, size in named if key is not None]

    # -- faults

    def _fault(self, error: BaseException) -> Fault:
        """What obstore's error means. Its text names URLs, so that only its kind and the HTTP status are kept."""
        text, name = str(error), type(error).__name__
        if name in _REFUSED:
            with self._mutex:
                new = name not in self._said
                self._said.add(name)
            if new:
                _log.warning("%s: %s", self.name, _REFUSED[name])
        status = _STATUS.search(text)
        detail = f"{name}, status {status[1]}" if status else name
        if _FULL.search(text):
            return Fault(FaultKind.FULL, detail)
        return Fault(FaultKind.LATE if _LATE.search(text) else FaultKind.IO_ERROR, detail)

    def _off(self) -> Fault:
        return Fault(FaultKind.OFF, f"{self.name} is closed")


class _Backend:
    """The obstore store of a URL, or one that was handed in."""

    def __init__(self, place: "str | Backend", name: str, timeout_s: float) -> None:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import LocalStore, MemoryStore, from_url
        except ImportError:
            raise UsageError(f"{name}: obstore is not installed: pip install 'kvwise[object]'") from None
        self.errors = (BaseError, OSError, ValueError)
        retries: Any = {"max_retries": _MAX_RETRIES, "retry_timeout": timedelta(seconds=timeout_s)}
        try:
            if not isinstance(place, str):
                self.store = place
            elif place.startswith("file:"):
                self.store = LocalStore.from_url(place, mkdir=True)
            elif place.startswith("memory:"):
                self.store = MemoryStore()
            else:
                # No client options: obstore would take them in place of all that the environment says of the client.
                self.store = from_url(place, retry_config=retries)
        except self.errors:
            raise UsageError(
                f"{name}: no object store can be opened from its URL: use s3://bucket/path, gs://bucket/path,"
                f" az://account/container/path, file:///folder or memory://"
            ) from None
        self.persistent = not isinstance(self.store, MemoryStore)


class _Found(NamedTuple):
    key: bytes
    num_bytes: int


class _Hull(NamedTuple):
    extent: Extent
    members: list[int]  # which of the extents asked for lie in it


def _done_or(future: "Future[R | Fault]", late: Fault) -> R | Fault:
    """What became of a job at the deadline; one that waits for its turn is not begun any more."""
    future.cancel()
    return future.result() if future.done() and not future.cancelled() else late


def _hulls(extents: Sequence[Extent]) -> list[_Hull]:
    """Requests that cover the extents, those of one record that lie close together in one."""
    hulls: list[_Hull] = []
    order = sorted(range(len(extents)), key=lambda i: (extents[i].key, extents[i].start))
    for i in order:
        key, start, stop = extents[i]
        last = hulls[-1].extent if hulls else None
        if last is None or last.key != key or (last.stop is not None and start > last.stop + _GAP_BYTES):
            hulls.append(_Hull(extents[i], [i]))
            continue
        end = None if last.stop is None or stop is None else max(last.stop, stop)
        hulls[-1] = _Hull(Extent(key, last.start, end), [*hulls[-1].members, i])
    return hulls
