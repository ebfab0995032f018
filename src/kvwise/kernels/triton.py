"""Triton kernels for GPUs: one pass over the pages of a segment, split over its length, merged by log-sum-exp.

Works in Triton's interpreter on CPU tensors too, which is how it is tested without a GPU. Imported only on demand:
triton is an optional dependency.
"""

# triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kvwise.kernels import triton_attend
from kvwise.kernels.base import Attention, Sealed, Segment, check_attend
from kvwise.kernels.packed import UNIT, Codes
from kvwise.kernels.reference import ReferenceKernels
from kvwise.kernels.triton_packed import memory_of, part_constants, tile_tokens
from kvwise.kernels.triton_sealing import TritonSealing

BLOCK_ROWS = 32  # (query, query head) pairs of one program; tl.dot wants at least 16
FEW_ROWS = 16  # where all sequences together have no more than this for each
BLOCK_KEYS = 64
PROGRAMS = 512  # about as many as keep a large GPU busy: 132 multiprocessors, a few programs each
PART_KEYS = 256  # keys of a part at least, or merging costs more than it saves


class TritonKernels(TritonSealing, ReferenceKernels):
    """Triton's attend and sealing; rows and open pages move, and tokens fold, by torch's own kernels.

    Packed pages are read as they lie, whatever the number of queries; but every 16 or 32 (query, head) rows read them
    anew, so a long prefill over packed pages costs that many conversions. Few rows over many keys are split into parts
    over the length; how many depends on the shapes alone, so results repeat to the bit. The mass of pages that several
    sequences share is added in any order. See `kvwise.kernels.base.Kernels`.
    """

    name = "triton"

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
        """See `Kernels.attend`; rows that fade and segments with queries of their own are the reference's."""
        if mass_fading is not None or any(segment.queries is not None for segment in segments):
            return super().attend(
                queries, query_start, segments, scale=scale, window=window, softcap=softcap,
                query_positions=query_positions, want_lse=want_lse, mass_rows=mass_rows, mass_fading=mass_fading,
            )  # fmt: skip
        num_heads = check_attend(queries, query_start, segments, query_positions)
        if queries.stride(2) != 1:
            queries = queries.contiguous()
        segments = [part for segment in segments for part in segment.parts()]
        call = _Call(queries, query_start, query_positions, num_heads, scale, window, softcap)
        out, lse = call.attend(segments)
        for segment in segments:
            call.add_mass(segment, lse, mass_rows)
        return Attention(out, lse if want_lse else None)


class _Call:
    """What the launches of one attend share."""

    def __init__(
        self,
        queries: Tensor,
        query_start: Tensor,
        query_positions: Tensor | None,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.queries = queries
        self.query_start = query_start
        self.num_heads = num_heads
        self.num_sequences = query_start.shape[0] - 1
        self.group = queries.shape[1] // num_heads
        few = queries.shape[0] * self.group <= FEW_ROWS * self.num_sequences
        self.rows = FEW_ROWS if few else BLOCK_ROWS
        # An argument that a switch turns off still needs some tensor or number in its place.
        self.shared: dict[str, Any] = {
            "queries": queries,
            "query_start": query_start,
            "query_positions": query_start if query_positions is None else query_positions,
            "scale": scale,
            "softcap": softcap or 1.0,
            "window": window or 0,
            "query_stride": queries.stride(0),
            "query_head_stride": queries.stride(1),
            "num_query_heads": queries.shape[1],
            "GROUP": self.group,
            "DK": queries.shape[2],
            "WINDOW": window is not None,
            "SOFTCAP": softcap is not None,
            "QUERY_POSITIONS": query_positions is not None,
            "M": self.rows,
            "N": BLOCK_KEYS,
            "enable_fp_fusion": True,  # for the compiler: some versions of Triton warn where it is not said
        }

    def _of(self, segment: Segment) -> dict[str, Any]:
        whole, tables, lengths = segment.whole_blocks, segment.tables, segment.lengths
        return {
            "keys": segment.keys,
            "tables": tables,
            "lengths": lengths,
            "positions": lengths if segment.positions is None else segment.positions,
            "table_stride": tables.stride(0),
            "table_head_stride": 0 if whole else tables.stride(1),
            "length_stride": lengths.stride(0),
            "length_head_stride": 0 if whole else lengths.stride(1),
            "page_stride": segment.page_stride,
            "page_offset": segment.page_offset,
            "DK_PADDED": _padded(segment, self.queries.shape[2]),
            "BLOCK_SIZE": segment.keys.shape[1],
            "PER_HEAD": not whole,
            "CAUSAL": segment.causal,
            "POSITIONS": segment.positions is not None,
            **(_no_pages(lengths) if segment.sealed is None else _pages_of(segment, segment.sealed)),
        }

    def attend(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """out in the queries' dtype, lse float32, over all segments."""
        num_tokens, num_query_heads, _ = self.queries.shape
        value_dim = segments[0].values.shape[2]
        # Enough blocks whatever the lengths of the sequences: no need to know them on the host.
        blocks = num_tokens * self.group // self.rows + self.num_sequences
        counts = [_num_parts(blocks * self.num_heads, segment) for segment in segments]
        shape = (sum(counts), num_tokens, num_query_heads)
        parts = self.queries.new_empty((*shape, value_dim), dtype=torch.float32)
        lses = self.queries.new_full(shape, -torch.inf, dtype=torch.float32)
        begin = 0
        for segment, count in zip(segments, counts, strict=True):
            self._attend(segment, blocks, parts[begin : begin + count], lses[begin : begin + count])
            begin += count
        out = self.queries.new_empty(num_tokens, num_query_heads, value_dim)
        lse = lses.new_empty(num_tokens, num_query_heads)
        num_rows = num_tokens * num_query_heads
        triton_attend.merge[(triton.cdiv(num_rows, BLOCK_ROWS),)](
            parts,
            lses,
            out,
            lse,
            len(parts),
            num_rows,
            DV=value_dim,
            DV_PADDED=triton.next_power_of_2(value_dim),
            M=BLOCK_ROWS,
            enable_fp_fusion=True,
        )
        return out, lse

    def _attend(self, segment: Segment, blocks: int, parts: Tensor, lses: Tensor) -> None:
        """Each part's own result over one segment."""
        value_dim = segment.values.shape[2]
        triton_attend.attend[(blocks, self.num_heads, len(parts))](
            values=segment.values,
            out=parts,
            lse=lses,
            num_sequences=self.num_sequences,
            num_parts=len(parts),
            part_stride=parts.stride(0),
            part_stride_lse=lses.stride(0),
            DV=value_dim,
            DV_PADDED=_padded(segment, value_dim),
            B=triton.next_power_of_2(self.num_sequences),
            **self.shared,
            **self._of(segment),
        )

    def add_mass(self, segment: Segment, lse: Tensor, mass_rows: Tensor | None) -> None:
        """Second pass over the keys of a segment that has columns for it; `lse` is final, over all segments."""
        sealed, marks = segment.sealed, segment.marks
        columns = [(False, segment.mass, _open_tokens(segment), BLOCK_KEYS)]
        if sealed is not None:
            page, tile = sealed.arena.format, tile_tokens(sealed.arena)
            tiles = sealed.tables.shape[2] * triton.cdiv(page.page_tokens, tile)
            columns.append((True, sealed.mass, tiles * tile, tile))
        for packed, mass, most, tile in columns:
            if mass is None or not most:
                continue
            given = self.shared | self._of(segment)
            for name in ("KEY_BYTES", "V_KIND", "V_BITS", "V_GROUP", "V_SPLIT", "V_TYPE"):
                given.pop(name)
            triton_attend.add_mass[(triton.cdiv(most, tile), self.num_heads, self.num_sequences)](
                mass_rows=self.query_start if mass_rows is None else mass_rows,
                mass=mass,
                mark_bounds=lse if marks is None else marks.bound.float().contiguous(),
                mark_positions=lse if marks is None else marks.position.float().contiguous(),
                lse=lse,
                MASS_ROWS=mass_rows is not None,
                MARKS=marks is not None,
                PACKED=packed,
                **given,
            )


def _padded(segment: Segment, dim: int) -> int:
    """Channels of a tile: a power of two, at least 16 for `tl.dot` and 32 for the units of codes."""
    return max(16 if segment.sealed is None else UNIT, int(triton.next_power_of_2(dim)))


def _open_tokens(segment: Segment) -> int:
    """Tokens that the open pages of one sequence can hold by its table: what the host knows of its length."""
    return segment.tables.shape[-1] * segment.keys.shape[1]


def _num_parts(programs: int, segment: Segment) -> int:
    """Parts that a segment is cut into where one each would give so many programs."""
    longest = _open_tokens(segment)
    if segment.sealed is not None:
        longest += segment.sealed.tables.shape[2] * segment.sealed.arena.format.page_tokens
    return max(1, min(PROGRAMS // max(1, programs), longest // PART_KEYS))


def _pages_of(segment: Segment, sealed: Sealed) -> dict[str, Any]:
    """The packed pages of a segment as kernels take them."""
    page = sealed.arena.format
    counts = (sealed.key_lengths, sealed.value_lengths, sealed.open_base)
    bounds = torch.stack([x.to(torch.int32) for x in counts])
    values = part_constants("V", page.values, page.head_dim)
    return {
        **memory_of(sealed.arena),
        "packed_tables": sealed.tables,
        "packed_table_stride": sealed.tables.stride(0),
        "packed_table_head_stride": sealed.tables.stride(1),
        "bounds": bounds,
        "bound_stride": bounds.stride(0),
        "packed_positions": bounds if sealed.positions is None else sealed.positions,
        "key_channels": bounds if sealed.key_channels is None else sealed.key_channels.contiguous(),
        "SEALED": True,
        "S": page.page_tokens,
        "NP": tile_tokens(sealed.arena),
        "KEY_BYTES": page.key_bytes,
        "UPPER": sealed.upper_only,
        "CHOSEN": sealed.key_channels is not None,
        "PACKED_POSITIONS": sealed.positions is not None,
        "DP": page.key_dim,
        "DP_PADDED": _padded(segment, page.key_dim),
        **part_constants("K", page.keys, page.head_dim),
        **values,
    }


def _no_pages(other: Tensor) -> dict[str, Any]:
    """What stands in for packed pages where there are none."""
    tensors = ("first_half", "second_half", "packed_tables", "bounds", "packed_positions", "key_channels")
    numbers = ("per_half", "half_bytes", "packed_table_stride", "packed_table_head_stride", "bound_stride")
    none = dict.fromkeys(tensors, other) | dict.fromkeys(numbers, 0)
    off = dict.fromkeys(("SEALED", "UPPER", "CHOSEN", "PACKED_POSITIONS"), False)
    sizes = dict.fromkeys(("S", "NP", "PAGE_BYTES", "KEY_BYTES", "DP", "DP_PADDED"), 16)
    nothing = Codes(8, "token", 16)
    return {**none, **off, **sizes, **part_constants("K", nothing, 16), **part_constants("V", nothing, 16)}
