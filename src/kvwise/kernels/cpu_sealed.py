"""Packed pages as the native side sees them, and native sealing."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvwise import _native
from kvwise.core.errors import UsageError
from kvwise.kernels.base import Sealed
from kvwise.kernels.packed import Codes, Float8, PackedArena, Part
from kvwise.kernels.reference_sealed import ReferenceSealing, check_seal, check_seal_rows

# How a dtype of rows is called in native/packed.h; float8 is 3.
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FLOAT8 = 3


def call(function: Callable[..., None], *arguments: object) -> None:
    """Call the native side; what it refuses (a slot or page outside its arena) is the caller's error."""
    try:
        function(*arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error


def address(arena: Tensor) -> int:
    """Where a contiguous tensor begins."""
    if not arena.is_contiguous():
        raise UsageError(f"an arena must be contiguous, got shape {tuple(arena.shape)} strides {arena.stride()}")
    return arena.data_ptr()


def packed_fields(packed: PackedArena) -> list[int]:
    """A packed arena as `packed_of` in native/module_packed.cpp reads it."""
    page, (first, second) = packed.format, packed.halves
    return [
        first.data_ptr(),
        second.data_ptr(),
        first.shape[1],
        page.page_bytes,
        packed.per_half,
        packed.num_pages,
        page.page_tokens,
        *_part_fields(page.keys, 0, page.head_dim),
        *_part_fields(page.values, page.key_bytes, page.head_dim),
    ]


def _part_fields(part: Part, first: int, head_dim: int) -> list[int]:
    if isinstance(part, Codes):
        return [first, head_dim, 0, part.bits, part.axis == "channel", part.group, part.split]
    if isinstance(part, Float8):
        return [first, head_dim, _FLOAT8, 0, 0, 0, 0]
    return [first, part.dim, STORAGE[part.dtype], 0, 0, 0, 0]


class SealedFields:
    """A segment's packed pages as the native side wants them; keeps converted tables alive for the call."""

    def __init__(self, sealed: Sealed) -> None:
        tables = _int32(sealed.tables)
        lengths = torch.stack([_int32(x) for x in (sealed.key_lengths, sealed.value_lengths, sealed.open_base)])
        channels = None if sealed.key_channels is None else _int32(sealed.key_channels).contiguous()
        self.alive = (tables, lengths, channels)
        _check_columns(sealed)
        self.fields = [
            *packed_fields(sealed.arena),
            sealed.upper_only,
            tables.data_ptr(),
            tables.stride(0),
            tables.stride(1),
            tables.shape[2],
            *(x.data_ptr() for x in lengths),
            lengths.stride(1),
            lengths.stride(2),
            0 if channels is None else channels.data_ptr(),
            0 if sealed.positions is None else address(sealed.positions),
            0 if sealed.mass is None else address(sealed.mass),
        ]


def _check_columns(sealed: Sealed) -> None:
    wanted = (sealed.arena.num_pages, sealed.arena.format.page_tokens)
    for column, dtype in ((sealed.positions, torch.int32), (sealed.mass, torch.float32)):
        if column is not None and (column.dtype != dtype or column.shape != wanted):
            raise UsageError(f"packed column {tuple(column.shape)} {column.dtype} must be {wanted} {dtype}")


def _int32(tensor: Tensor) -> Tensor:
    tensor = tensor.to(torch.int32)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class CpuSealing(ReferenceSealing):
    """Native `seal_*`; `unseal` is the reference's. See `kvwise.kernels.base.Kernels`."""

    _instruction_set: str
    _num_threads: int | None

    @property
    def _threads(self) -> int:
        return self._num_threads or torch.get_num_threads()

    def seal_keys(
        self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor, channels: Tensor | None = None
    ) -> None:
        """See `Kernels.seal_keys`."""
        check_seal(arena, slots, packed, pages, channels)
        self._seal(arena, slots, packed, pages, channels, keys=True)

    def seal_values(self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor) -> None:
        """See `Kernels.seal_values`."""
        check_seal(arena, slots, packed, pages, None, values=True)
        self._seal(arena, slots, packed, pages, None, keys=False)

    def _seal(
        self,
        arena: Tensor,
        slots: Tensor,
        packed: PackedArena,
        pages: Tensor,
        channels: Tensor | None,
        *,
        keys: bool,
    ) -> None:
        slots, pages = _longs(slots), _longs(pages)
        channels = None if channels is None else _longs(channels)
        call(
            _native.seal_pages,
            self._instruction_set,
            *_open_rows(arena),
            slots.data_ptr(),
            packed_fields(packed),
            keys,
            pages.data_ptr(),
            0 if channels is None else channels.data_ptr(),
            len(pages),
            self._threads,
        )

    def seal_value_rows(self, arena: Tensor, slots: Tensor, packed: PackedArena, packed_slots: Tensor) -> None:
        """See `Kernels.seal_value_rows`."""
        check_seal_rows(arena, slots, packed, packed_slots)
        slots, packed_slots = _longs(slots), _longs(packed_slots)
        call(
            _native.seal_value_rows,
            self._instruction_set,
            *_open_rows(arena),
            slots.data_ptr(),
            packed_fields(packed),
            packed_slots.data_ptr(),
            len(slots),
            self._threads,
        )


def _open_rows(arena: Tensor) -> tuple[int, int, int, int]:
    """Address, slots, channels and storage of an open arena [P, block_size, D]."""
    if arena.dtype not in STORAGE:
        raise UsageError(f"pages of {arena.dtype} cannot be packed; use float32, bfloat16 or float16")
    return address(arena), arena.shape[0] * arena.shape[1], arena.shape[2], STORAGE[arena.dtype]


def _longs(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64).contiguous()
