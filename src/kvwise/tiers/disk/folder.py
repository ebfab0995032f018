"""A tier's folder: whether it is ours, which files in it are segments, and their descriptors."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from kvwise.core.errors import UsageError
from kvwise.tiers.disk.system import System

MARKER = "kvwise-tier"
MARKER_TEXT = b"kvwise disk tier, format 1\n"
_NAME = re.compile(r"segment-([0-9a-f]{16})-[0-9]{8}\.kv")
_DIRECT = getattr(os, "O_DIRECT", 0)
_TRIES = 3


class Folder:
    """A real directory that holds our marker, segment files, and perhaps files of others, which are never touched.

    It is held by its descriptor: what happens to its name later (renamed, replaced by a link) changes nothing.
    """

    def __init__(self, path: str | Path, system: System) -> None:
        self.path = Path(os.path.abspath(path))  # a slash at the end would make the system follow a link
        self.system = system
        self.token = secrets.token_hex(8)  # of the segments created through this object
        self._direct = _DIRECT
        self._num_created = 0
        self.fd = self._open_root()
        try:
            self._claim()
        except BaseException:
            os.close(self.fd)
            raise

    def _open_root(self) -> int:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            why = "it is a symbolic link" if self.path.is_symlink() else os.strerror(error.errno or 0)
            raise UsageError(f"disk tier {self.path}: {why}; name a real folder that can be written") from None
        if os.path.samestat(os.fstat(fd), os.stat("/")):
            os.close(fd)
            raise UsageError(f"disk tier {self.path}: that is the root of the file system; name an empty folder")
        return fd

    def _claim(self) -> None:
        """Find our marker, or leave it in an empty folder. A marker cut short by a crash is made whole."""
        names = os.listdir(self.fd)
        if MARKER not in names and names:
            raise UsageError(
                f"disk tier {self.path}: the folder holds {len(names)} other files and no {MARKER!r};"
                " name an empty or a new folder"
            )
        try:
            text = self._read_marker() if MARKER in names else b""
            if text != MARKER_TEXT and MARKER_TEXT.startswith(text):
                fd = self.system.open(MARKER, os.O_WRONLY | os.O_CREAT, self.fd)
                try:
                    self.system.pwrite(fd, MARKER_TEXT, 0)
                    self.system.fdatasync(fd)
                finally:
                    os.close(fd)
                text = MARKER_TEXT
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise UsageError(f"disk tier {self.path}: {MARKER}: {why}; name a folder that can be written") from None
        if text != MARKER_TEXT:
            raise UsageError(
                f"disk tier {self.path}: {MARKER} says {text[:40]!r}, this version reads {MARKER_TEXT[:-1]!r};"
                " name another folder, or empty this one"
            )

    def _read_marker(self) -> bytes:
        fd = self.system.open(MARKER, os.O_RDONLY, self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return b"not a file"
            return os.read(fd, 4096)
        finally:
            os.close(fd)

    def segments(self) -> dict[str, os.stat_result]:
        """Name and status of every segment file. Links, pipes, devices, and files with a second name are foreign."""
        found = {}
        with os.scandir(self.fd) as entries:
            for name in sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name)):
                try:
                    status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                    found[name] = status
        return found

    def is_own(self, name: str) -> bool:
        """Whether this object made the segment."""
        return name.split("-")[1] == self.token

    def open(self, name: str) -> int:
        """A descriptor of a segment, for writing too where the file system allows it."""
        for flags in (os.O_RDWR, os.O_RDONLY):
            try:
                fd = self._open(name, flags)
            except OSError as error:
                if flags == os.O_RDWR and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                    continue
                if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe: not what it was
                    break
                raise
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                return fd
            os.close(fd)
            break
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def create(self) -> tuple[str, int]:
        """Name and descriptor of a new segment, locked for as long as the descriptor is open."""
        for _ in range(_TRIES):
            self._num_created += 1
            name = f"segment-{self.token}-{self._num_created:08d}.kv"
            fd = self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # Another process may have taken the empty file for one left behind, before the lock.
            if self.system.lock(fd) and os.fstat(fd).st_nlink == 1:
                return name, fd
            os.close(fd)
            with contextlib.suppress(OSError):
                self.system.unlink(name, self.fd)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def _open(self, name: str, flags: int) -> int:
        try:
            return self.system.open(name, flags | self._direct, self.fd)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._direct = 0  # this file system has no direct reads: through the page cache then
        if flags & os.O_EXCL:  # some create the file before they refuse
            flags &= ~os.O_EXCL
        return self.system.open(name, flags, self.fd)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self.fd)


class Handles:
    """Descriptors of segments, at most `limit` of them open unless more are in use at one moment."""

    def __init__(self, folder: Folder, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._open: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: dict[int, int] = {}
        self._mutex = Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[int]:
        """The descriptor of a segment; FileNotFoundError if its file is gone, even if it was open before."""
        fd = self._take(name)
        try:
            yield fd
        finally:
            with self._mutex:
                self._users[fd] -= 1
                if self._users[fd] == 0 and fd not in self._open.values():
                    self._close(fd)  # dropped meanwhile

    def _take(self, name: str) -> int:
        with self._mutex:
            fd = self._open.get(name)
            if fd is None:
                fd = self._open_one(name)
                self._open[name] = fd
                self._users[fd] = 0
            elif os.fstat(fd).st_nlink == 0:
                self._forget(name)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._open.move_to_end(name)
            self._users[fd] += 1
            self._shrink(self._limit)
            return fd

    def _open_one(self, name: str) -> int:
        try:
            return self._folder.open(name)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._shrink(0)
        return self._folder.open(name)

    def _shrink(self, limit: int) -> None:
        idle = [name for name, fd in self._open.items() if self._users[fd] == 0]
        for name in idle[: max(0, len(self._open) - limit)]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        fd = self._open.pop(name, None)
        if fd is not None and self._users[fd] == 0:
            self._close(fd)

    def _close(self, fd: int) -> None:
        del self._users[fd]
        os.close(fd)

    def drop(self, name: str) -> None:
        """Close the descriptor as soon as nobody uses it."""
        with self._mutex:
            self._forget(name)

    def close(self) -> None:
        """Drop all of them."""
        with self._mutex:
            for name in list(self._open):
                self._forget(name)
