"""Memory for arenas: zeroed lazily by the system and backed by huge pages where it offers them."""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE = 2 * 1024 * 1024


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor. On a CPU it lies in an anonymous mapping of its own, advised to use huge pages.

    Random reads of 4 KiB pages lose a tenth to a quarter of the bandwidth to address translation otherwise, and the
    mapping is handed back to the system the moment the tensor is gone.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _HUGE:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    mapping = _anonymous(num_bytes + _HUGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    skip = -start % _HUGE
    # The tensor holds the buffer, the buffer holds the mapping: all of it goes when the tensor does.
    flat = torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes, offset=skip)
    return flat.view(dtype).view(tuple(shape))


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Private zeroed memory. Python's default is a shared mapping, which gets no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
