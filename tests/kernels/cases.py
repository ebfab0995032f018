"""Random paged attention problems, and a dense softmax that knows nothing of pages."""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvwise.kernels import Segment


@dataclass(frozen=True)
class Case:
    """One attention problem over one segment; `per_head` lengths differ by head."""

    queries: tuple[int, ...] = (1, 1, 1)  # of each sequence
    past: tuple[int, ...] = (5, 40, 0)  # keys before them
    num_heads: int = 2
    group: int = 2
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    num_layers: int = 3
    layer: int = 1
    per_head: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    shuffled_positions: bool = False
    query_positions: bool = False
    mass: bool = True
    mass_rows: tuple[int, ...] | None = None
    seed: int = 0

    def with_(self, **changes: object) -> "Case":
        return replace(self, **changes)


@dataclass
class Problem:
    case: Case
    queries: Tensor
    query_start: Tensor
    segment: Segment
    query_positions: Tensor | None
    mass_rows: Tensor | None

    @property
    def options(self) -> dict[str, object]:
        return {
            "scale": self.case.key_dim**-0.5 * 1.5,
            "window": self.case.window,
            "softcap": self.case.softcap,
            "query_positions": self.query_positions,
            "mass_rows": self.mass_rows,
            "want_lse": True,
        }

    def to(self, device: torch.device) -> "Problem":
        """The same problem in another memory."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        given = {f.name: getattr(self.segment, f.name) for f in fields(self.segment)}
        segment = Segment(**{name: move(v) if isinstance(v, Tensor) else v for name, v in given.items()})
        return Problem(
            self.case,
            self.queries.to(device),
            self.query_start.to(device),
            segment,
            move(self.query_positions),
            move(self.mass_rows),
        )


def make(case: Case) -> Problem:
    """Arenas full of noise (also where nothing may be read), tables in random order."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, heads, size = len(case.queries), case.num_heads, case.block_size
    counts = torch.tensor(case.queries)
    lengths = counts + torch.tensor(case.past)
    if case.per_head:
        extra = torch.randint(0, 40, (batch, heads), generator=generator)
        lengths = lengths[:, None] + extra
    width = int(lengths.max()) // size + 2
    if case.per_head:
        num_pages = batch * heads * width + 3
        tables = torch.randperm(num_pages, generator=generator)[: batch * heads * width].view(batch, heads, width)
        stride, offset = 1, 0
    else:
        stride, offset = case.num_layers * heads, case.layer * heads
        num_blocks = batch * width + 2
        num_pages = num_blocks * stride
        tables = torch.randperm(num_blocks, generator=generator)[: batch * width].view(batch, width)
    keys = torch.randn(num_pages, size, case.key_dim, generator=generator).to(case.dtype)
    values = torch.randn(num_pages, size, case.value_dim, generator=generator).to(case.dtype)
    positions = None
    if case.shuffled_positions:
        positions = torch.randint(0, int(lengths.max()), (num_pages, size), generator=generator, dtype=torch.int32)
    total = int(counts.sum())
    segment = Segment(
        keys,
        values,
        tables.int(),
        lengths.int(),
        num_kv_heads=None if case.per_head else heads,
        page_stride=stride,
        page_offset=offset,
        causal=case.causal,
        positions=positions,
        mass=torch.randn(num_pages, size, generator=generator) if case.mass else None,
    )
    return Problem(
        case,
        torch.randn(total, heads * case.group, case.key_dim, generator=generator),
        torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
        segment,
        torch.randint(0, int(lengths.max()) + 3, (total,), generator=generator, dtype=torch.int32)
        if case.query_positions
        else None,
        None if case.mass_rows is None else torch.tensor(case.mass_rows, dtype=torch.int32),
    )


def dense(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and mass by explicit loops over (sequence, head, query), in float64."""
    case, segment = problem.case, problem.segment
    size, group = case.block_size, case.group
    out = torch.zeros(*problem.queries.shape[:2], case.value_dim, dtype=torch.float64)
    lse = torch.full(problem.queries.shape[:2], -math.inf, dtype=torch.float64)
    mass = None if segment.mass is None else segment.mass.double().flatten()
    for b, n in enumerate(case.queries):
        counted = n if problem.mass_rows is None else int(problem.mass_rows[b])
        for h in range(case.num_heads):
            length = int(segment.lengths[b, h] if case.per_head else segment.lengths[b])
            slots = []
            for j in range(length):
                if case.per_head:
                    page = int(segment.tables[b, h, j // size])
                else:
                    page = int(segment.tables[b, j // size]) * segment.page_stride + segment.page_offset + h
                slots.append(page * size + j % size)
            index = torch.tensor(slots, dtype=torch.int64)
            keys = segment.keys.flatten(0, 1)[index].double()
            values = segment.values.flatten(0, 1)[index].double()
            where = torch.arange(length)
            at = where if segment.positions is None else segment.positions.flatten()[index]
            for i in range(n):
                row = int(problem.query_start[b]) + i
                seen = where < length - n + i + 1 if case.causal else where < length
                if case.window is not None:
                    own = length - n + i if problem.query_positions is None else int(problem.query_positions[row])
                    seen = seen & (own - at >= 0) & (own - at < case.window)
                for g in range(group):
                    logits = keys @ problem.queries[row, h * group + g].double() * problem.options["scale"]
                    if case.softcap is not None:
                        logits = case.softcap * torch.tanh(logits / case.softcap)
                    logits = logits[seen]
                    if len(logits) == 0:
                        continue
                    lse[row, h * group + g] = torch.logsumexp(logits, 0)
                    probs = torch.softmax(logits, 0)
                    out[row, h * group + g] = probs @ values[seen]
                    if mass is not None and i >= n - counted:
                        mass[index[seen]] += probs
    return out, lse, mass
