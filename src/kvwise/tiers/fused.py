"""One pass over the bytes of blocks: copied and checked at once, by the native module or by plain Python.

Addresses are `Tensor.data_ptr()`. What is checked is what arrived in the target, so a source may change meanwhile: the
answer is then that it is not sound. Native copies run without the interpreter's lock.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

from xxhash import xxh3_128

from kvwise.core.errors import UsageError
from kvwise.tiers.base import Fault
from kvwise.tiers.record import Header, header_bytes, open_record, pack_codec, pack_fixed, padded, seal

# A call that moves more than this stores past the caches: lines need not be read before they are overwritten, and
# blocks on their way between tiers push nothing out of the caches.
_STREAMED_BYTES = 128 << 10


class Shape(NamedTuple):
    """How the bytes of a raw block lie in an arena: bytes of a layer, and from one layer to the next."""

    num_layers: int
    key_bytes: int
    value_bytes: int
    key_stride: int
    value_stride: int

    @property
    def record_bytes(self) -> int:
        """Bytes of the record of such a block."""
        return header_bytes(self.num_layers) + self.num_layers * padded(self.key_bytes + self.value_bytes)


class Wanted(NamedTuple):
    """What records must say to be those that were asked for."""

    keys: list[bytes]
    identity: bytes
    codec: str


class Copier(Protocol):
    """Sisters with one signature, see below."""

    name: str

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> bytes:
        """Copy (source, target, bytes) one after another; target 0: only read. The xxh3-128 of all of them."""
        ...

    def seal(
        self, shape: Shape, headers: list[Header], keys: list[int], values: list[int], targets: list[memoryview]
    ) -> None:
        """Write records, `shape.record_bytes` each, into `targets`; `keys` and `values` is where layer 0 begins."""
        ...

    def open(
        self, shape: Shape, wanted: Wanted, records: list[memoryview], keys: list[int], values: list[int]
    ) -> list[bool]:
        """Copy each record's block into place. False: it is not sound or another one, and the place holds rubbish."""
        ...


class NativeCopier:
    """`native/records.cpp` with one instruction set, over `num_threads` threads."""

    def __init__(self, instruction_set: str, num_threads: int = 1) -> None:
        from kvwise import _native

        self.name = f"native-{instruction_set}"
        self._native = _native
        self._set = instruction_set
        self._num_threads = num_threads

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> bytes:
        """See `Copier.copy`."""
        return self._native.copy_pieces(self._set, list(pieces), sum(n for _, _, n in pieces) > _STREAMED_BYTES)

    def seal(
        self, shape: Shape, headers: list[Header], keys: list[int], values: list[int], targets: list[memoryview]
    ) -> None:
        """See `Copier.seal`."""
        num_bytes = shape.record_bytes
        fixed = [pack_fixed(header, shape.num_layers, num_bytes) for header in headers]
        streaming = num_bytes * len(headers) > _STREAMED_BYTES
        self._native.seal_blocks(self._set, list(shape), fixed, keys, values, targets, streaming, self._num_threads)

    def open(
        self, shape: Shape, wanted: Wanted, records: list[memoryview], keys: list[int], values: list[int]
    ) -> list[bool]:
        """See `Copier.open`."""
        codec = pack_codec(wanted.codec)
        streaming = shape.record_bytes * len(records) > _STREAMED_BYTES
        return self._native.open_blocks(
            self._set, list(shape), records, wanted.keys, wanted.identity, codec, keys, values, streaming,
            self._num_threads,
        )  # fmt: skip


class PlainCopier:
    """The specification: a copy, then xxhash over what arrived."""

    name = "plain"

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> bytes:
        """See `Copier.copy`."""
        digest = xxh3_128()
        for source, target, num_bytes in pieces:
            if target and num_bytes:
                ctypes.memmove(target, source, num_bytes)
            digest.update(_at(target or source, num_bytes))
        return digest.digest()

    def seal(
        self, shape: Shape, headers: list[Header], keys: list[int], values: list[int], targets: list[memoryview]
    ) -> None:
        """See `Copier.seal`."""
        for header, at_keys, at_values, target in zip(headers, keys, values, targets, strict=True):
            target[:] = b"".join(seal(header, _layers(shape, at_keys, at_values)))

    def open(
        self, shape: Shape, wanted: Wanted, records: list[memoryview], keys: list[int], values: list[int]
    ) -> list[bool]:
        """See `Copier.open`."""
        return [
            self._open(open_record(bytes(record), key, wanted.identity, wanted.codec), _layers(shape, *places))
            for record, key, *places in zip(records, wanted.keys, keys, values, strict=True)
        ]

    def _open(
        self, opened: tuple[Header, list[memoryview]] | Fault, layers: list[tuple[memoryview, memoryview]]
    ) -> bool:
        if isinstance(opened, Fault) or len(opened[1]) != len(layers):
            return False
        for segment, (keys, values) in zip(opened[1], layers, strict=True):
            if len(segment) != len(keys) + len(values):
                return False
            keys[:] = segment[: len(keys)]
            values[:] = segment[len(keys) :]
        return True


def _layers(shape: Shape, keys: int, values: int) -> list[tuple[memoryview, memoryview]]:
    return [
        (
            _at(keys + layer * shape.key_stride, shape.key_bytes),
            _at(values + layer * shape.value_stride, shape.value_bytes),
        )
        for layer in range(shape.num_layers)
    ]


def _at(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def copiers() -> list[str]:
    """Names of the copiers that can run here, fastest first."""
    if importlib.util.find_spec("kvwise._native") is None:
        return [PlainCopier.name]
    from kvwise import _native

    return [*(f"native-{name}" for name in _native.instruction_sets()), PlainCopier.name]


@cache
def copier(name: str | None = None, num_threads: int = 1) -> Copier:
    """The copier of this name, or the fastest; `num_threads` is for the native ones. UsageError if it cannot run."""
    names = copiers()
    chosen = name or names[0]
    if chosen not in names:
        raise UsageError(f"no copier called {chosen!r}; available here: {', '.join(names)}")
    return PlainCopier() if chosen == PlainCopier.name else NativeCopier(chosen.removeprefix("native-"), num_threads)
