"""The calls of the operating system that the disk tier makes, as an object that a test can make fail."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence

from kvwise.tiers.base import Buffer, Fault, FaultKind

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EBADF}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENXIO}
NO_HOLES = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class System:
    """Thin names for system calls; every one raises `OSError` as the system does and releases the interpreter lock."""

    def __init__(self) -> None:
        # Python offers no way to punch a hole; where the C library has none either, space comes back with the file.
        self._fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
        if self._fallocate is not None:
            self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def open(self, name: str, flags: int, folder: int) -> int:
        """A descriptor of a file in the folder that descriptor `folder` is of; never through a link."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=folder)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """Bytes written at `offset`: all of `data`, or the first of it."""
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes read from `offset` on into the buffers; 0 at the end of the file."""
        return os.preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        """Return when the bytes, and the length needed to find them, are on the medium."""
        (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        """Cut the file."""
        os.ftruncate(fd, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Hand the bytes of a range back to the file system; they read as zeros from then on."""
        if self._fallocate is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if self._fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def unlink(self, name: str, folder: int) -> None:
        """Remove a file of the folder."""
        os.unlink(name, dir_fd=folder)

    def lock(self, fd: int) -> bool:
        """Hold the file for as long as this descriptor is open, unless another descriptor does."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def write_all(system: System, fd: int, data: memoryview, offset: int) -> None:
    """Write every byte, or raise."""
    while data:
        done = system.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def fault_of(error: OSError) -> Fault:
    """What an error of the system means to the tier."""
    number = error.errno or errno.EIO
    detail = os.strerror(number)
    if number in _REFUSED:
        return Fault(FaultKind.FULL, detail)
    if number in _GONE:
        return Fault(FaultKind.OFF, f"the folder or its file is gone: {detail}")
    return Fault(FaultKind.IO_ERROR, detail)
