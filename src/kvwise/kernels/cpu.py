"""Native CPU kernels: the torch face of `kvwise._native`, which sees addresses, shapes and strides only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise import _native
from kvwise.core.errors import UsageError
from kvwise.kernels.base import Attention, Segment, check_attend
from kvwise.kernels.cpu_folded import CpuFolding
from kvwise.kernels.cpu_sealed import STORAGE, SealedFields, address, call


def instruction_sets() -> list[str]:
    """Instruction sets compiled in that this CPU has, fastest first."""
    return _native.instruction_sets()


class CpuKernels(CpuFolding):
    """C++ kernels for one instruction set; float32 sums for every storage dtype. See `kvwise.kernels.base.Kernels`.

    They use `num_threads` threads; None: as many as torch does at the time of the call.

    A few query rows against packed codes whose steps fold (keys by channel, values by token, groups of whole vectors)
    are multiplied as integers: the query times the steps and the probabilities times the steps are rounded to int8 for
    codes of up to 4 bits and to int16 for longer ones. On normal noise this adds 1-2 % to the output's relative error
    where 4 bits themselves cost 12-16 %, and less than 0.1 % above 4 bits. `exact` reads all codes as float32 instead,
    as many rows (prefill) always do. `unseal` is the reference's.
    """

    def __init__(self, instruction_set: str, num_threads: int | None = None, *, exact: bool = False) -> None:
        if instruction_set not in _native.instruction_sets():
            raise UsageError(
                f"instruction set {instruction_set!r} cannot run on this CPU; "
                f"available: {', '.join(_native.instruction_sets())}"
            )
        self._instruction_set = instruction_set
        self._num_threads = num_threads
        self._exact = exact
        self._workspace = _native.Workspace()

    @property
    def name(self) -> str:
        """`cpu-` and the instruction set."""
        return f"cpu-{self._instruction_set}"

    def attend(
        self,
        queries: Tensor,
        query_start: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        query_positions: Tensor | None = None,
        want_lse: bool = False,
        mass_rows: Tensor | None = None,
        mass_fading: Tensor | None = None,
    ) -> Attention:
        """See `Kernels.attend`."""
        num_heads = check_attend(queries, query_start, segments, query_positions)
        _check_storage(segments)
        num_tokens, num_query_heads, key_dim = queries.shape
        value_dim = segments[0].values.shape[2]
        rows = queries.float()
        apart = any(segment.queries is not None for segment in segments)
        if rows.stride(2) != 1 or apart:
            rows = rows.contiguous()
        starts = _ints(query_start)
        positions = None if query_positions is None else _ints(query_positions)
        counted = None if mass_rows is None else _ints(mass_rows)
        fading = None if mass_fading is None else mass_fading.float().contiguous()
        views = [_Fields(segment) for segment in segments]
        out = torch.empty((num_tokens, num_query_heads, value_dim), dtype=torch.float32)
        lse = torch.empty((num_tokens, num_query_heads), dtype=torch.float32)
        if num_tokens:
            call(
                _native.attend,
                self._workspace,
                self._instruction_set,
                STORAGE[segments[0].keys.dtype],
                num_heads,
                num_query_heads // num_heads,
                key_dim,
                value_dim,
                num_tokens,
                starts.shape[0] - 1,
                rows.data_ptr(),
                rows.stride(0),
                rows.stride(1),
                starts.data_ptr(),
                0 if positions is None else positions.data_ptr(),
                0 if counted is None else counted.data_ptr(),
                0 if fading is None else fading.data_ptr(),
                [view.fields for view in views],
                out.data_ptr(),
                lse.data_ptr(),
                scale,
                0 if window is None else window,
                0.0 if softcap is None else softcap,
                self._exact,
                self._threads,
            )
        return Attention(out.to(queries.dtype), lse if want_lse else None)

    def append(
        self,
        keys_new: Tensor,
        values_new: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        *,
        page_stride: int = 1,
        page_offset: int = 0,
    ) -> None:
        """See `Kernels.append`."""
        self._append(keys_new, keys, slots, page_stride, page_offset)
        self._append(values_new, values, slots, page_stride, page_offset)

    def _append(self, rows: Tensor, arena: Tensor, slots: Tensor, page_stride: int, page_offset: int) -> None:
        num_tokens, num_heads, dim = rows.shape
        if arena.shape[2] != dim or slots.shape[0] != num_tokens:
            raise UsageError(
                f"new rows {tuple(rows.shape)} do not fit arena {tuple(arena.shape)} and slots {tuple(slots.shape)}"
            )
        if rows.dtype != arena.dtype:
            rows = rows.float()
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        slots = _longs(slots)
        start, num_slots, row_bytes = _rows(arena)
        if num_tokens:
            call(
                _native.append,
                self._instruction_set,
                rows.data_ptr(),
                rows.stride(0) * rows.element_size(),
                rows.stride(1) * rows.element_size(),
                rows.dtype != arena.dtype,
                STORAGE[arena.dtype],
                dim,
                start,
                num_slots,
                row_bytes,
                num_tokens,
                num_heads,
                slots.data_ptr(),
                slots.ndim == 2,
                arena.shape[1],
                page_stride,
                page_offset,
                self._threads,
            )

    def gather(self, arena: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Kernels.gather`."""
        shape = (slots.shape[0], *arena.shape[2:])
        if out is None:
            out = torch.empty(shape, dtype=arena.dtype)
        elif out.shape != shape or out.dtype != arena.dtype or not out.is_contiguous():
            raise UsageError(f"out must be contiguous {shape} {arena.dtype}, got {tuple(out.shape)} {out.dtype}")
        slots = _longs(slots)
        call(
            _native.gather,
            *_rows(arena),
            slots.data_ptr(),
            len(slots),
            out.data_ptr(),
            self._threads,
        )
        return out

    def scatter(self, rows: Tensor, arena: Tensor, slots: Tensor) -> None:
        """See `Kernels.scatter`."""
        if rows.shape != (slots.shape[0], *arena.shape[2:]):
            raise UsageError(f"rows {tuple(rows.shape)} do not fit {len(slots)} slots of arena {tuple(arena.shape)}")
        rows, slots = rows.to(arena.dtype).contiguous(), _longs(slots)
        call(_native.scatter, rows.data_ptr(), *_rows(arena), slots.data_ptr(), len(slots), self._threads)

    def move_slots(self, arena: Tensor, source: Tensor, target: Tensor) -> None:
        """See `Kernels.move_slots`."""
        source, target = _longs(source), _longs(target)
        _check_pairs(source, target)
        call(_native.move_slots, *_rows(arena), source.data_ptr(), target.data_ptr(), len(source))

    def copy_pages(
        self, source_arena: Tensor, source_pages: Tensor, target_arena: Tensor, target_pages: Tensor
    ) -> None:
        """See `Kernels.copy_pages`."""
        if source_arena.shape[1:] != target_arena.shape[1:] or source_arena.dtype != target_arena.dtype:
            raise UsageError(
                f"arenas must agree in dtype and page shape: {tuple(source_arena.shape)} {source_arena.dtype} "
                f"against {tuple(target_arena.shape)} {target_arena.dtype}"
            )
        source_pages, target_pages = _longs(source_pages), _longs(target_pages)
        _check_pairs(source_pages, target_pages)
        call(
            _native.copy_pages,
            address(source_arena),
            source_arena.shape[0],
            source_pages.data_ptr(),
            address(target_arena),
            target_arena.shape[0],
            target_pages.data_ptr(),
            source_arena[0].numel() * source_arena.element_size(),
            len(source_pages),
            self._threads,
        )

    def lowest(self, worth: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.lowest`."""
        n, width = worth.shape
        if first.shape != (n,) or stop.shape != (n,):
            raise UsageError(f"{n} rows need as many bounds, got {tuple(first.shape)} and {tuple(stop.shape)}")
        worth, first, stop = worth.float().contiguous(), _ints(first), _ints(stop)
        least, where = torch.empty(n), torch.empty(n, dtype=torch.int64)
        call(
            _native.lowest,
            self._instruction_set,
            worth.data_ptr(),
            width,
            first.data_ptr(),
            stop.data_ptr(),
            n,
            least.data_ptr(),
            where.data_ptr(),
            self._threads,
        )
        return least, where

    def lowest_mass(
        self, mass: Tensor, positions: Tensor, tables: Tensor, first: Tensor, stop: Tensor, newest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.lowest_mass`."""
        n, width = tables.shape
        if any(part.shape != (n,) for part in (first, stop, newest)):
            raise UsageError(
                f"{n} tables need as many bounds, got {tuple(first.shape)}, {tuple(stop.shape)}, {tuple(newest.shape)}"
            )
        if mass.shape != positions.shape or mass.dtype != torch.float32 or positions.dtype != torch.int32:
            raise UsageError(
                f"columns {tuple(mass.shape)} {mass.dtype} and {tuple(positions.shape)} {positions.dtype} must be"
                " float32 and int32 of one shape"
            )
        tables, first, stop, newest = (_ints(part).contiguous() for part in (tables, first, stop, newest))
        least, where = torch.empty(n), torch.empty(n, dtype=torch.int64)
        call(
            _native.lowest_mass,
            self._instruction_set,
            address(mass),
            address(positions),
            *mass.shape,
            tables.data_ptr(),
            width,
            first.data_ptr(),
            stop.data_ptr(),
            newest.data_ptr(),
            n,
            least.data_ptr(),
            where.data_ptr(),
            self._threads,
        )
        return least, where

    def rotate(self, keys: Tensor, delta: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
        """See `Kernels.rotate`."""
        cos, sin, which = self.angles(delta, inv_freq)
        return self.turn(keys, cos, sin, which[None], interleaved=interleaved)[0].to(keys.dtype)

    def angles(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels.angles`."""
        positions, inv_freq = _longs(positions), inv_freq.double().contiguous()
        n, half = positions.numel(), len(inv_freq)
        cos, sin = torch.empty((2, n, half), dtype=torch.float32)
        which = torch.empty_like(positions)
        num_angles = _native.angles(
            positions.data_ptr(), n, inv_freq.data_ptr(), half, cos.data_ptr(), sin.data_ptr(), which.data_ptr()
        )
        return cos[:num_angles], sin[:num_angles], which

    def turn(self, rows: Tensor, cos: Tensor, sin: Tensor, which: Tensor, *, interleaved: bool = False) -> Tensor:
        """See `Kernels.turn`."""
        num_rows, dim = rows.shape
        if which.shape[1:] != rows.shape[:1] or cos.shape != sin.shape or 2 * cos.shape[1] > dim:
            raise UsageError(
                f"rows {tuple(rows.shape)} do not fit angles {tuple(cos.shape)}, {tuple(sin.shape)} and which "
                f"{tuple(which.shape)}"
            )
        out = torch.empty((len(which), num_rows, dim), dtype=torch.float32)
        rows, cos, sin, which = _floats(rows), _floats(cos), _floats(sin), _longs(which)
        call(
            _native.turn_rows,
            rows.data_ptr(),
            num_rows,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            *cos.shape,
            interleaved,
            which.data_ptr(),
            which.numel(),
            out.data_ptr(),
            self._threads,
        )
        return out


class _Fields:
    """A segment as the native side wants it; keeps converted tables alive for the length of the call."""

    def __init__(self, segment: Segment) -> None:
        tables, lengths = _ints(segment.tables), _ints(segment.lengths)
        whole, first = segment.whole_blocks, int(segment.is_stack)  # the dim of sequences
        sealed = None if segment.sealed is None else SealedFields(segment.sealed)
        met = None if segment.queries is None else segment.queries.float().contiguous()
        marks = None
        if segment.marks is not None:
            marks = [part.float().contiguous() for part in (segment.marks.bound, segment.marks.position)]
        self.alive = (tables, lengths, met, sealed, marks)
        self.fields = [
            address(segment.keys),
            address(segment.values),
            tables.data_ptr(),
            tables.stride(first),
            0 if whole else tables.stride(first + 1),
            tables.shape[-1],
            lengths.data_ptr(),
            lengths.stride(first),
            0 if whole else lengths.stride(first + 1),
            segment.page_stride if whole else 1,
            segment.page_offset if whole else 0,
            1 if whole else 0,
            segment.keys.shape[0],
            segment.keys.shape[1],
            segment.causal,
            0 if segment.positions is None else address(segment.positions),
            0 if segment.mass is None else address(segment.mass),
            0 if met is None else met.data_ptr(),
            *((0, 0) if marks is None else (part.data_ptr() for part in marks)),
            len(tables) if first else 1,
            tables.stride(0),
            lengths.stride(0),
            0 if met is None else met.stride(0),
            *(() if sealed is None else sealed.fields),
        ]


def _rows(arena: Tensor) -> tuple[int, int, int]:
    """Address, slots and bytes a slot of an arena [P, block_size, D] or column [P, block_size]."""
    num_slots = arena.shape[0] * arena.shape[1]
    return address(arena), num_slots, arena.element_size() * (arena.shape[2] if arena.ndim == 3 else 1)


def _ints(tensor: Tensor) -> Tensor:
    # Asked first: a conversion that has nothing to do costs five times as much, dozens of times a step.
    if tensor.dtype is not torch.int32:
        tensor = tensor.to(torch.int32)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _longs(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.int64 and tensor.is_contiguous() else tensor.to(torch.int64).contiguous()


def _floats(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def _check_pairs(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise UsageError(f"{len(source)} sources for {len(target)} targets")


def _check_storage(segments: Sequence[Segment]) -> None:
    first = segments[0]
    for segment in segments:
        if segment.keys.dtype not in STORAGE:
            raise UsageError(f"pages of {segment.keys.dtype} cannot be read; use float32, bfloat16 or float16")
        if segment.keys.dtype != first.keys.dtype or segment.values.shape[2] != first.values.shape[2]:
            raise UsageError("all segments of one attend must share dtype and value dim")
        for column, dtype in ((segment.positions, torch.int32), (segment.mass, torch.float32)):
            if column is not None and (column.dtype != dtype or column.shape != segment.keys.shape[:2]):
                raise UsageError(
                    f"column {tuple(column.shape)} {column.dtype} must be {tuple(segment.keys.shape[:2])} {dtype}"
                )
