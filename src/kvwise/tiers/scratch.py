"""Memory that answers lie in until their thread asks again: the same pages each time, so none of them is faulted in."""

import threading

import torch

from kvwise.tiers.memory import allocate

_ALIGNMENT = 64
_SLAB_BYTES = 4 << 20
_KEPT_BYTES = 128 << 20


class Scratch(threading.local):
    """Buffers of one thread, handed out one after another and all taken back at once."""

    def __init__(self) -> None:
        self._slabs: list[memoryview] = []
        self._used = 0  # bytes of the last slab

    def begin(self) -> None:
        """Take back all buffers. What took several slabs before gets one that holds it all."""
        if len(self._slabs) > 1:
            num_bytes = sum(map(len, self._slabs))
            self._slabs = [_slab(num_bytes)] if num_bytes <= _KEPT_BYTES else self._slabs[:1]
        if self._slabs and len(self._slabs[0]) > _KEPT_BYTES:
            self._slabs = []
        self._used = 0

    def place(self, num_bytes: int) -> memoryview:
        """A buffer of so many bytes, aligned to 64. Its bytes are left over from earlier."""
        if not self._slabs or self._used + num_bytes > len(self._slabs[-1]):
            self._slabs.append(_slab(max(num_bytes, _SLAB_BYTES)))
            self._used = 0
        start = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._slabs[-1][start : start + num_bytes]


def _slab(num_bytes: int) -> memoryview:
    return allocate((num_bytes,), torch.uint8, torch.device("cpu")).numpy().data
