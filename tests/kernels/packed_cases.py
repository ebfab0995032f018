"""Packed pages written out with numpy from the papers' formulas, and random problems over packed and open pages."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvwise.kernels import Kernels, Sealed, Segment, kernels_for
from kvwise.kernels.packed import Codes, Float8, PackedArena, PageFormat, Part, Plain, unpack

CPU = torch.device("cpu")


def encoded(rows: np.ndarray, part: Part, *, upper_only: bool = False) -> np.ndarray:
    """Rows [S, D] after one trip through a part, number by number as the papers have it; float64."""
    if isinstance(part, Plain):
        return torch.from_numpy(rows).to(part.dtype).double().numpy()
    if isinstance(part, Float8):
        return _float8(rows)
    out = np.empty(rows.shape)
    if part.axis == "channel":  # KIVI's keys: groups of tokens of one channel
        for start in range(0, rows.shape[0], part.group):
            for d in range(rows.shape[1]):
                where = (slice(start, start + part.group), d)
                out[where] = _affine(rows[where], part, upper_only)
        return out
    for t in range(rows.shape[0]):  # KIVI's values: groups of channels of one token
        for start in range(0, rows.shape[1], part.group):
            where = (t, slice(start, start + part.group))
            out[where] = _affine(rows[where], part, upper_only)
    return out


def _affine(x: np.ndarray, part: Codes, upper_only: bool) -> np.ndarray:
    levels = 15 if part.split else 2**part.bits - 1
    step = float(np.float16((x.max() - x.min()) / np.float32(levels)))
    zero = float(np.float16(x.min()))
    if step == 0:
        return np.full(x.shape, zero)
    code = np.clip(np.rint((x.astype(np.float64) - zero) / step), 0, levels)
    if not part.split or upper_only:
        return code * step + zero
    lower = np.clip(np.rint((x - (code * step + zero)) / (step / 16)), -8, 7)
    return (16 * code + lower) * (step / 16) + zero


def _float8(rows: np.ndarray) -> np.ndarray:
    """Nearest e4m3 number of x / scale: 3 bits of mantissa, exponents down to -6, then even steps of 2**-9."""
    scale = np.float32(np.abs(rows).max() / 448) or np.float32(1)
    x = rows.astype(np.float64) / float(scale)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
    quantum = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / quantum) * quantum, -448, 448) * float(scale)


@dataclass(frozen=True)
class PackedCase:
    """One problem over one segment of packed and open pages; lengths of each (sequence, head) are drawn."""

    format: PageFormat
    queries: tuple[int, ...] = (1, 1, 1)
    packed_pages: tuple[int, ...] = (2, 0, 3)  # at most, of each sequence
    open_tokens: int = 40  # at most, behind them
    values_behind: int = 0  # at most so many tokens whose key is packed have open values
    num_heads: int = 2
    group: int = 2
    block_size: int = 16
    dtype: torch.dtype = torch.float16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    positions: bool = False
    mass_rows: tuple[int, ...] | None = None
    upper_only: bool = False
    outliers: float = 1.0  # every 16th channel of the keys is so much larger
    seed: int = 0

    def with_(self, **changes: object) -> "PackedCase":
        return replace(self, **changes)


@dataclass
class PackedProblem:
    case: PackedCase
    queries: Tensor
    query_start: Tensor
    segment: Segment
    query_positions: Tensor | None
    mass_rows: Tensor | None
    num_open: int  # pages of the segment's own arena

    @property
    def options(self) -> dict[str, object]:
        return {
            "scale": self.case.format.head_dim**-0.5,
            "window": self.case.window,
            "softcap": self.case.softcap,
            "query_positions": self.query_positions,
            "mass_rows": self.mass_rows,
            "want_lse": True,
        }


def arena_for(form: PageFormat, num_pages: int, *, spare: int = 100, fill: int = 0xFF) -> PackedArena:
    """Memory for at least so many pages, three to a half of a block; filled with what reads as nan in float16."""
    half = form.page_bytes * 3 + spare
    blocks = num_pages // 6 + 1
    first, second = (torch.full((blocks, half), fill, dtype=torch.uint8) for _ in range(2))
    return PackedArena((first, second), form)


def make_packed(case: PackedCase, sealer: Kernels | None = None) -> PackedProblem:
    """Pages packed by the reference (or `sealer`) from drawn rows; tables in random order, foreign memory noise."""
    sealer = sealer or kernels_for(CPU, "reference")
    g = torch.Generator().manual_seed(case.seed)
    form, batch, heads = case.format, len(case.queries), case.num_heads
    tokens, dim, size = form.page_tokens, form.head_dim, case.block_size
    counts = torch.tensor(case.queries)
    pages = torch.stack([torch.randint(0, most + 1, (heads,), generator=g) for most in case.packed_pages])
    row_granular = isinstance(form.keys, Plain)
    ragged = torch.randint(0, tokens, (batch, heads), generator=g) if row_granular else torch.zeros(batch, heads).long()
    key_lengths = (pages * tokens - ragged).clamp(min=0)
    behind = torch.randint(0, case.values_behind + 1, (batch, heads), generator=g)
    value_lengths = (key_lengths - behind).clamp(min=0)
    open_base = (value_lengths - torch.randint(0, 20, (batch, heads), generator=g)).clamp(min=0)
    lengths = key_lengths + torch.randint(0, case.open_tokens + 1, (batch, heads), generator=g)
    lengths = torch.maximum(lengths, counts[:, None].expand_as(lengths))
    width = int((lengths - open_base).max()) // size + 2
    num_open = batch * heads * width + 3
    tables = torch.randperm(num_open, generator=g)[: batch * heads * width].view(batch, heads, width)
    keys = torch.randn(num_open, size, dim, generator=g) * torch.where(torch.arange(dim) % 16 == 3, case.outliers, 1.0)
    values = torch.randn(num_open, size, dim, generator=g)
    packed_width = max(1, int(pages.max()) + 1)
    total = batch * heads * packed_width
    packed = arena_for(form, total + 4)
    packed_tables = torch.randperm(packed.num_pages, generator=g)[:total].view(batch, heads, packed_width)
    channels = None
    if form.key_dim < dim:
        chosen = [torch.randperm(dim, generator=g)[: form.key_dim].sort().values for _ in range(batch * heads)]
        channels = torch.stack(chosen).view(batch, heads, form.key_dim)
    # What is packed comes from an arena of its own: one page of S rows for each packed page.
    source_keys = torch.randn(total, tokens, dim, generator=g) * torch.where(
        torch.arange(dim) % 16 == 3, case.outliers, 1.0
    )
    source_values = torch.randn(total, tokens, dim, generator=g)
    slots = torch.arange(total * tokens).view(total, tokens)
    each = None if channels is None else channels.repeat_interleave(packed_width, dim=1).flatten(0, 1)
    sealer.seal_keys(source_keys.to(case.dtype), slots, packed, packed_tables.flatten(), each)
    sealer.seal_values(source_values.to(case.dtype), slots, packed, packed_tables.flatten())
    positions = [None, None]
    if case.positions:
        most = int(lengths.max()) + 1
        positions = [
            torch.randint(0, most, shape, generator=g, dtype=torch.int32)
            for shape in ((num_open, size), (packed.num_pages, tokens))
        ]
    sealed = Sealed(
        packed,
        packed_tables.int(),
        key_lengths.int(),
        value_lengths.int(),
        open_base.int(),
        None if channels is None else channels.int(),
        case.upper_only,
        positions[1],
        torch.randn(packed.num_pages, tokens, generator=g),
    )
    segment = Segment(
        keys.to(case.dtype),
        values.to(case.dtype),
        tables.int(),
        lengths.int(),
        causal=case.causal,
        positions=positions[0],
        mass=torch.randn(num_open, size, generator=g),
        sealed=sealed,
    )
    rows = int(counts.sum())
    return PackedProblem(
        case,
        torch.randn(rows, heads * case.group, dim, generator=g),
        torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
        segment,
        torch.randint(0, int(lengths.max()) + 3, (rows,), generator=g, dtype=torch.int32) if case.positions else None,
        None if case.mass_rows is None else torch.tensor(case.mass_rows, dtype=torch.int32),
        num_open,
    )


def run(kernels: Kernels, problem: PackedProblem, *more: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, mass of open pages and mass of packed pages; leaves the problem's own masses as they were."""
    segment, sealed = problem.segment, problem.segment.sealed
    assert segment.mass is not None
    assert sealed is not None
    assert sealed.mass is not None
    open_mass, packed_mass = segment.mass.clone(), sealed.mass.clone()
    fresh = replace(segment, mass=open_mass, sealed=replace(sealed, mass=packed_mass))
    out, lse = kernels.attend(problem.queries, problem.query_start, [fresh, *more], **problem.options)  # type: ignore[arg-type]
    assert lse is not None
    return out, lse, open_mass, packed_mass


def dense_packed(problem: PackedProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by explicit loops over (sequence, head, query) in float64; pages are read by `unpack` alone."""
    case, segment, sealed = problem.case, problem.segment, problem.segment.sealed
    assert sealed is not None
    assert segment.mass is not None
    assert sealed.mass is not None
    form = case.format
    pages = sealed.arena.gather(torch.arange(sealed.arena.num_pages))
    all_keys, all_values = (
        unpack(rows, part, form.page_tokens, form.head_dim, upper_only=case.upper_only)
        for rows, part in ((pages[:, : form.key_bytes], form.keys), (pages[:, form.key_bytes :], form.values))
    )
    out = torch.zeros(*problem.queries.shape[:2], form.head_dim, dtype=torch.float64)
    lse = torch.full(problem.queries.shape[:2], -math.inf, dtype=torch.float64)
    masses = segment.mass.double().clone(), sealed.mass.double().clone()
    for b, n in enumerate(case.queries):
        counted = n if problem.mass_rows is None else int(problem.mass_rows[b])
        for h in range(case.num_heads):
            length = int(segment.lengths[b, h])
            keys, values, cells, at = [], [], [], []
            for t in range(length):
                entry = min(t // form.page_tokens, sealed.tables.shape[2] - 1)
                page, row = int(sealed.tables[b, h, entry]), t % form.page_tokens
                slot = max(0, t - int(sealed.open_base[b, h]))
                place = (int(segment.tables[b, h, slot // case.block_size]), slot % case.block_size)
                key = torch.zeros(form.head_dim, dtype=torch.float64)
                is_packed = t < int(sealed.key_lengths[b, h])
                if not is_packed:
                    key = segment.keys[place].double()
                elif sealed.key_channels is None:
                    key = all_keys[page, row].double()
                else:
                    key[sealed.key_channels[b, h].long()] = all_keys[page, row].double()
                keys.append(key)
                packed_value = t < int(sealed.value_lengths[b, h])
                values.append((all_values[page, row] if packed_value else segment.values[place]).double())
                cells.append((1, page, row) if is_packed else (0, *place))
                column = sealed.positions if is_packed else segment.positions
                at.append(t if column is None else int(column[cells[-1][1:]]))
            where, where_at = torch.arange(length), torch.tensor(at)
            for i in range(n):
                row = int(problem.query_start[b]) + i
                seen = where < length - n + i + 1 if case.causal else where < length
                if case.window is not None:
                    own = length - n + i if problem.query_positions is None else int(problem.query_positions[row])
                    seen = seen & (own - where_at >= 0) & (own - where_at < case.window)
                if not seen.any():
                    continue
                for q in range(h * case.group, (h + 1) * case.group):
                    logits = torch.stack(keys) @ problem.queries[row, q].double() * problem.options["scale"]
                    if case.softcap is not None:
                        logits = case.softcap * torch.tanh(logits / case.softcap)
                    logits = logits.masked_fill(~seen, -math.inf)
                    lse[row, q] = torch.logsumexp(logits, 0)
                    probs = torch.softmax(logits, 0)
                    out[row, q] = probs @ torch.stack(values)
                    for (which, *cell), p in zip(cells, probs.tolist(), strict=True):
                        if i >= n - counted:
                            masses[which][tuple(cell)] += p
    return out, lse, *masses
