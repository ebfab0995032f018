"""Triton kernels for GPUs: one pass over the pages per segment, partial results merged by log-sum-exp.

Works in Triton's interpreter on CPU tensors too, which is how it is tested without a GPU. Imported only on demand:
triton is an optional dependency.
"""

# triton ships no types, and what a kernel takes (pointers, compile-time constants) Python's types cannot say.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvwise.kernels.base import Attention, Segment, check_attend
from kvwise.kernels.reference import ReferenceKernels

BLOCK_ROWS = 32  # (query, query head) pairs of one program; tl.dot wants at least 16
BLOCK_KEYS = 64


@triton.jit
def _find_sequence(query_start, num_sequences, block, GROUP: tl.constexpr, M: tl.constexpr, B: tl.constexpr):
    """Sequence that row block `block` belongs to, and its number within it; blocks are dealt out with one to spare."""
    at = tl.arange(0, B)
    starts = tl.load(query_start + at, mask=at < num_sequences, other=0) * GROUP // M + at
    sequence = tl.sum(((starts <= block) & (at < num_sequences)).to(tl.int32), 0) - 1
    first = tl.load(query_start + sequence)
    return sequence, block - (first * GROUP // M + sequence)


@triton.jit
def _slots_of(tables, index, used, head, page_stride, page_offset, PER_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """int64 slots of indices in table order."""
    entry = tl.load(tables + index // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
    page = entry if PER_HEAD else entry * page_stride + page_offset + head
    return page * BLOCK_SIZE + index % BLOCK_SIZE


@triton.jit
def _scores(
    queries, keys, slots, index, used, limit, at, positions, scale, softcap, window, DK: tl.constexpr,
    DK_PADDED: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Masked logits [M, N] in float32: queries [M, Dk] against the keys at `slots`."""
    d = tl.arange(0, DK_PADDED)
    key = tl.load(keys + slots[:, None] * DK + d[None, :], mask=used[:, None] & (d[None, :] < DK), other=0.0)
    scores = tl.dot(queries, tl.trans(key.to(queries.dtype)), input_precision="ieee").to(tl.float32) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1)
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    visible = used[None, :] & (index[None, :] < limit[:, None])
    if WINDOW:
        where = tl.load(positions + slots, mask=used, other=0) if POSITIONS else index
        distance = at[:, None] - where[None, :]
        visible = visible & (distance >= 0) & (distance < window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _attend(
    queries, query_start, query_positions, keys, values, tables, lengths, positions, out, lse, scale, softcap, window,
    num_sequences, query_stride, query_head_stride, table_stride, table_head_stride, length_stride,
    length_head_stride, page_stride, page_offset, num_query_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr, QUERY_POSITIONS: tl.constexpr, SOFTCAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Online softmax of M rows of one (sequence, KV head) over one segment (FlashAttention-2, arXiv 2307.08691)."""
    head = tl.program_id(1)
    sequence, block = _find_sequence(query_start, num_sequences, tl.program_id(0), GROUP, M, B)
    first = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first
    if block * M >= num_queries * GROUP:
        return
    row = block * M + tl.arange(0, M)
    valid = row < num_queries * GROUP
    query = tl.minimum(row // GROUP, num_queries - 1)
    query_head = head * GROUP + row % GROUP
    length = tl.load(lengths + sequence * length_stride + head * length_head_stride)
    own = length - num_queries + query
    limit = tl.minimum(own + 1, length) if CAUSAL else tl.zeros_like(own) + length
    at = tl.load(query_positions + first + query) if QUERY_POSITIONS else own
    d = tl.arange(0, DK_PADDED)
    token = (first + query).to(tl.int64)
    q = tl.load(
        queries + token[:, None] * query_stride + query_head[:, None] * query_head_stride + d[None, :],
        mask=valid[:, None] & (d[None, :] < DK), other=0.0,
    )  # fmt: skip
    dv = tl.arange(0, DV_PADDED)
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    summed = tl.zeros([M, DV_PADDED], tl.float32)
    table = tables + sequence * table_stride + head * table_head_stride
    begin = 0
    if WINDOW and not POSITIONS:
        begin = tl.maximum(tl.min(at) - window + 1, 0) // N * N
    for start in range(begin, tl.max(limit), N):
        index = start + tl.arange(0, N)
        used = index < length
        slots = _slots_of(table, index, used, head, page_stride, page_offset, PER_HEAD, BLOCK_SIZE)
        scores = _scores(
            q, keys, slots, index, used, limit, at, positions, scale, softcap, window, DK, DK_PADDED, WINDOW,
            POSITIONS, SOFTCAP,
        )  # fmt: skip
        highest = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(scores - shift[:, None])
        alpha = tl.exp(maximum - shift)
        value = tl.load(values + slots[:, None] * DV + dv[None, :], mask=used[:, None] & (dv[None, :] < DV), other=0.0)
        weight = p.to(q.dtype)
        summed = summed * alpha[:, None] + tl.dot(weight, value.to(q.dtype), input_precision="ieee").to(tl.float32)
        total = total * alpha + tl.sum(p, 1)
        maximum = highest
    norm = tl.where(total > 0.0, total, 1.0)
    cell = token * num_query_heads + query_head
    tl.store(out + cell[:, None] * DV + dv[None, :], summed / norm[:, None], mask=valid[:, None] & (dv[None, :] < DV))
    tl.store(lse + cell, tl.where(total > 0.0, maximum + tl.log(norm), float("-inf")), mask=valid)


@triton.jit
def _add_mass(
    queries, query_start, query_positions, mass_rows, keys, tables, lengths, positions, mass, lse, scale, softcap,
    window, query_stride, query_head_stride, table_stride, table_head_stride, length_stride, length_head_stride,
    page_stride, page_offset, num_query_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DK_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr, QUERY_POSITIONS: tl.constexpr,
    SOFTCAP: tl.constexpr, MASS_ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What N keys of one (sequence, KV head) receive from all counted rows, given each row's final log-sum-exp."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    first = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first
    length = tl.load(lengths + sequence * length_stride + head * length_head_stride)
    start = tl.program_id(0) * N
    if (num_queries == 0) or (start >= length):
        return
    index = start + tl.arange(0, N)
    used = index < length
    table = tables + sequence * table_stride + head * table_head_stride
    slots = _slots_of(table, index, used, head, page_stride, page_offset, PER_HEAD, BLOCK_SIZE)
    counted = tl.minimum(tl.load(mass_rows + sequence), num_queries) if MASS_ROWS else num_queries
    first_query = num_queries - counted
    if CAUSAL:
        first_query = tl.maximum(first_query, start - (length - num_queries))
    received = tl.zeros([N], tl.float32)
    for begin in range(first_query * GROUP, num_queries * GROUP, M):
        row = begin + tl.arange(0, M)
        valid = row < num_queries * GROUP
        query = tl.minimum(row // GROUP, num_queries - 1)
        query_head = head * GROUP + row % GROUP
        own = length - num_queries + query
        limit = tl.minimum(own + 1, length) if CAUSAL else tl.zeros_like(own) + length
        at = tl.load(query_positions + first + query) if QUERY_POSITIONS else own
        d = tl.arange(0, DK_PADDED)
        token = (first + query).to(tl.int64)
        q = tl.load(
            queries + token[:, None] * query_stride + query_head[:, None] * query_head_stride + d[None, :],
            mask=valid[:, None] & (d[None, :] < DK), other=0.0,
        )  # fmt: skip
        scores = _scores(
            q, keys, slots, index, used, limit, at, positions, scale, softcap, window, DK, DK_PADDED, WINDOW,
            POSITIONS, SOFTCAP,
        )  # fmt: skip
        total = tl.load(lse + token * num_query_heads + query_head, mask=valid, other=float("-inf"))
        seen = valid & (total > float("-inf"))
        p = tl.where(seen[:, None], tl.exp(scores - tl.where(seen, total, 0.0)[:, None]), 0.0)
        received += tl.sum(p, 0)
    tl.atomic_add(mass + slots, received, mask=used)


class TritonKernels(ReferenceKernels):
    """Triton's attend; rows and pages move by torch's own indexing kernels. See `kvwise.kernels.base.Kernels`."""

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
    ) -> Attention:
        """See `Kernels.attend`."""
        num_heads = check_attend(queries, query_start, segments, query_positions)
        if queries.stride(2) != 1:
            queries = queries.contiguous()
        call = _Call(queries, query_start, query_positions, num_heads, scale, window, softcap)
        parts = [call.attend(segment) for segment in segments]
        out, lse = parts[0] if len(parts) == 1 else _merge(parts)
        for segment in segments:
            if segment.mass is not None:
                call.add_mass(segment, segment.mass, lse, mass_rows)
        return Attention(out.to(queries.dtype), lse if want_lse else None)


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
        self.query_positions = query_positions
        self.num_heads = num_heads
        self.num_sequences = query_start.shape[0] - 1
        self.group = queries.shape[1] // num_heads
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
            "DK_PADDED": max(16, triton.next_power_of_2(queries.shape[2])),
            "WINDOW": window is not None,
            "SOFTCAP": softcap is not None,
            "QUERY_POSITIONS": query_positions is not None,
            "M": BLOCK_ROWS,
            "N": BLOCK_KEYS,
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
            "BLOCK_SIZE": segment.keys.shape[1],
            "PER_HEAD": not whole,
            "CAUSAL": segment.causal,
            "POSITIONS": segment.positions is not None,
        }

    def attend(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """out and lse, float32, of this segment alone."""
        num_tokens, num_query_heads, _ = self.queries.shape
        value_dim = segment.values.shape[2]
        out = torch.zeros(num_tokens, num_query_heads, value_dim, dtype=torch.float32, device=self.queries.device)
        lse = torch.full_like(out[..., 0], -torch.inf)
        # Enough blocks whatever the lengths of the sequences: no need to know them on the host.
        blocks = num_tokens * self.group // BLOCK_ROWS + self.num_sequences
        _attend[(blocks, self.num_heads)](
            values=segment.values,
            out=out,
            lse=lse,
            num_sequences=self.num_sequences,
            DV=value_dim,
            DV_PADDED=max(16, triton.next_power_of_2(value_dim)),
            B=triton.next_power_of_2(self.num_sequences),
            **self.shared,
            **self._of(segment),
        )
        return out, lse

    def add_mass(self, segment: Segment, mass: Tensor, lse: Tensor, mass_rows: Tensor | None) -> None:
        """Second pass over the keys; `lse` is final, over all segments."""
        blocks = triton.cdiv(segment.tables.shape[-1] * segment.keys.shape[1], BLOCK_KEYS)
        _add_mass[(blocks, self.num_heads, self.num_sequences)](
            mass_rows=self.query_start if mass_rows is None else mass_rows,
            mass=mass,
            lse=lse,
            MASS_ROWS=mass_rows is not None,
            **self.shared,
            **self._of(segment),
        )


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial results over disjoint keys, weighted by their shares of the total."""
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(total == -torch.inf, 0.0, total))
    return (torch.stack([out for out, _ in parts]) * weights[..., None]).sum(0), total
