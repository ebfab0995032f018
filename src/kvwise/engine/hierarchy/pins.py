"""Pins that outlive the process: which records of a tier's folder nobody may evict, in a file beside them."""

import fcntl
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from kvwise.core.errors import UsageError

_log = logging.getLogger(__name__)
FILE = "kvwise-pins.json"  # the disk store leaves alone what is not named as a segment
_NEW = f"{FILE}.new"
_FORMAT = 1
_MAX_BYTES = 64 << 20
_KEY_DIGITS = 64

Signature = tuple[int, int, int]


class PinFile:
    """The pins of one tier folder: record key -> until when, in Unix seconds (infinity: until it is unpinned).

    Read as a whole and written as a whole: to a second name, synced, and renamed, under a lock of the folder, so that
    no reader ever sees half of it and two writers lose nothing of each other's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._seen: Signature | None = None

    def read(self) -> dict[bytes, float]:
        """All pins; none if there is no file. UsageError for a file that is damaged or of another format."""
        text = self._text()
        return {} if text is None else _parse(text, self.folder / FILE)

    def news(self) -> dict[bytes, float] | None:
        """All pins if the file has changed since the last call, else None; a damaged one is told once and ignored."""
        try:
            status = os.stat(self.folder / FILE, follow_symlinks=False)
            now: Signature | None = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            now = None
        if now == self._seen:
            return None
        self._seen = now
        try:
            return self.read()
        except UsageError as error:
            _log.warning("%s", error)
            return None

    def change(self, add: Mapping[bytes, float] = {}, drop: Iterable[bytes] = ()) -> dict[bytes, float]:
        """Add pins (a later deadline holds), drop others, write the file; all pins that are left.

        UsageError if the file is damaged, or cannot be written.
        """
        try:
            with self._lock() as fd:
                pins = self.read()
                for key, until in add.items():
                    pins[key] = max(until, pins.get(key, until))
                for key in drop:
                    pins.pop(key, None)
                self._write(fd, pins)
                return pins
        except OSError as error:
            raise UsageError(f"{self.folder / FILE}: {os.strerror(error.errno or 0)}; pins cannot be kept") from None

    @contextmanager
    def _lock(self) -> Iterator[int]:
        """Descriptor of the folder, locked against other writers of pins."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _write(self, folder: int, pins: Mapping[bytes, float]) -> None:
        body = {"format": _FORMAT, "pins": {k.hex(): None if t == inf else t for k, t in sorted(pins.items())}}
        text = json.dumps({**body, "xxh3": _digest(body)}, indent=1) + "\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(_NEW, flags, 0o600, dir_fd=folder), "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(_NEW, FILE, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)

    def _text(self) -> bytes | None:
        try:
            fd = os.open(self.folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged(self.folder / FILE, os.strerror(error.errno or 0)) from None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise _damaged(self.folder / FILE, "not a small file")
            return file.read(_MAX_BYTES)


def _digest(body: Mapping[str, object]) -> str:
    return xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path}: {why}; remove it to go on without the pins it kept")


def _parse(text: bytes, path: Path) -> dict[bytes, float]:
    try:
        found = json.loads(text)
        body = {"format": found["format"], "pins": found["pins"]}
        if found["xxh3"] != _digest(body):
            raise _damaged(path, "its checksum is wrong")
        if body["format"] != _FORMAT:
            raise _damaged(path, f"it has format {body['format']}, this version reads {_FORMAT}")
        pins = {bytes.fromhex(key): inf if until is None else float(until) for key, until in body["pins"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, "it is no list of pins") from None
    if any(len(key) != _KEY_DIGITS // 2 or not (until == inf or isfinite(until)) for key, until in pins.items()):
        raise _damaged(path, "it is no list of pins")
    return pins
