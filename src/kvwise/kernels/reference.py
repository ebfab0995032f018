"""The specification of the kernels in plain torch: any device, float32 arithmetic, written to be read."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.kernels.base import Attention, Segment, check_attend
from kvwise.kernels.reference_folded import ReferenceFolding
from kvwise.kernels.reference_sealed import ReferenceSealing, sealed_rows

# Query rows handled at once: the logits held are ROWS x keys, so that a long prompt needs no T x T matrix here either.
ROWS = 256


@dataclass(frozen=True, slots=True)
class _View:
    """One segment as one sequence sees it, all heads padded to S slots."""

    keys: Tensor  # [H, S, Dk] float32
    values: Tensor  # [H, S, Dv] float32
    slots: Tensor  # int64 [H, S]
    lengths: Tensor  # int64 [H, 1, 1]
    positions: Tensor  # int64 [H, 1, S]
    segment: Segment
    sealed_slots: Tensor | None = None  # int64 [H, S], of tokens whose key is packed
    in_sealed: Tensor | None = None  # bool [H, S]


@dataclass(frozen=True, slots=True)
class _Look:
    """How some query rows of one sequence look at keys."""

    index: Tensor  # int64 [n] of the rows within the sequence
    num_queries: int  # of the whole sequence
    positions: Tensor | None  # int64 [n]
    scale: float
    window: int | None
    softcap: float | None


class ReferenceKernels(ReferenceSealing, ReferenceFolding):
    """Plain torch kernels; see `kvwise.kernels.base.Kernels` for what each must do."""

    name = "reference"

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
        segments = [part for segment in segments for part in segment.parts()]
        num_tokens, num_query_heads, _ = queries.shape
        out = queries.new_zeros(num_tokens, num_query_heads, segments[0].values.shape[2])
        lse = queries.new_full((num_tokens, num_query_heads), -math.inf, dtype=torch.float32)
        for b, (first, last) in enumerate(itertools.pairwise(query_start.tolist())):
            views = [_view(segment, b, num_heads) for segment in segments] if first < last else []
            counted_from = first if mass_rows is None else max(first, last - int(mass_rows[b]))
            received = [torch.zeros(view.slots.shape, device=queries.device) for view in views]
            for start in range(first, last, ROWS):
                rows = torch.arange(start, min(start + ROWS, last), device=queries.device)
                positions = None if query_positions is None else query_positions[rows].long()
                look = _Look(rows - first, last - first, positions, scale, window, softcap)
                met = [queries if view.segment.queries is None else view.segment.queries for view in views]
                total, probs = _softmax([
                    _logits(_grouped(of[rows], num_heads), view, look) for of, view in zip(met, views, strict=True)
                ])  # fmt: skip
                parts = [torch.einsum("hngs,hsd->nhgd", p, view.values) for p, view in zip(probs, views, strict=True)]
                out[rows] = torch.stack(parts).sum(0).flatten(1, 2).to(out.dtype)
                lse[rows] = total.transpose(0, 1).flatten(1, 2)
                counted = (rows >= counted_from).float()
                if mass_fading is not None:
                    counted *= (-mass_fading[rows]).exp()
                received = [
                    so_far + torch.einsum("hngs,n->hs", p, counted) for so_far, p in zip(received, probs, strict=True)
                ]
            for view, mass in zip(views, received, strict=True):
                _receive(view, mass, b)
        return Attention(out, lse if want_lse else None)

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
        block_size = keys.shape[1]
        if slots.ndim == 1:
            heads = torch.arange(keys_new.shape[1], device=slots.device)
            pages = (slots // block_size * page_stride + page_offset)[:, None] + heads
            slots = pages * block_size + (slots % block_size)[:, None]
        self.scatter(keys_new.flatten(0, 1), keys, slots.flatten())
        self.scatter(values_new.flatten(0, 1), values, slots.flatten())

    def gather(self, arena: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Kernels.gather`."""
        return torch.index_select(arena.flatten(0, 1), 0, slots, out=out)

    def scatter(self, rows: Tensor, arena: Tensor, slots: Tensor) -> None:
        """See `Kernels.scatter`."""
        arena.view(-1, *arena.shape[2:]).index_copy_(0, slots, rows.to(arena.dtype))

    def move_slots(self, arena: Tensor, source: Tensor, target: Tensor) -> None:
        """See `Kernels.move_slots`."""
        rows = arena.view(-1, *arena.shape[2:])
        # One gather and one scatter equal the ordered copies unless a slot is read after it was written.
        written_at = {slot: i for i, slot in reversed(list(enumerate(target.tolist())))}
        if all(written_at.get(slot, i) >= i for i, slot in enumerate(source.tolist())):
            last = {slot: i for i, slot in enumerate(target.tolist())}
            order = torch.tensor(sorted(last.values()), dtype=torch.int64, device=source.device)
            rows[target[order]] = rows[source[order]]
            return
        for read, written in zip(source.tolist(), target.tolist(), strict=True):
            rows[written] = rows[read].clone()

    def copy_pages(
        self, source_arena: Tensor, source_pages: Tensor, target_arena: Tensor, target_pages: Tensor
    ) -> None:
        """See `Kernels.copy_pages`."""
        target_arena.index_copy_(0, target_pages, source_arena.index_select(0, source_pages))

    def lowest(self, worth: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.lowest`."""
        index = torch.arange(worth.shape[1], device=worth.device)
        inside = (index >= first[:, None]) & (index < stop[:, None])
        least, where = worth.float().masked_fill(~inside, torch.inf).min(1)
        return least, where

    def lowest_mass(
        self, mass: Tensor, positions: Tensor, tables: Tensor, first: Tensor, stop: Tensor, newest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Kernels.lowest_mass`."""
        masses, held = (column[tables.long()].flatten(1) for column in (mass, positions))
        return self.lowest(masses.masked_fill(held > newest[:, None], torch.inf), first, stop)

    def rotate(self, keys: Tensor, delta: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
        """See `Kernels.rotate`."""
        cos, sin, which = self.angles(delta, inv_freq)
        return self.turn(keys, cos, sin, which[None], interleaved=interleaved)[0].to(keys.dtype)

    def angles(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels.angles`."""
        distinct, which = torch.unique(positions, return_inverse=True)
        angles = distinct.double()[:, None] * inv_freq.double()
        return angles.cos().float(), angles.sin().float(), which

    def turn(self, rows: Tensor, cos: Tensor, sin: Tensor, which: Tensor, *, interleaved: bool = False) -> Tensor:
        """See `Kernels.turn`."""
        half, rows = cos.shape[1], rows.float()
        cos, sin = cos[which], sin[which]
        rotary = rows[:, : 2 * half]
        x, y = (rotary[:, 0::2], rotary[:, 1::2]) if interleaved else (rotary[:, :half], rotary[:, half:])
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=3 if interleaved else 2).flatten(2)
        return torch.cat((turned, rows[:, 2 * half :].expand(len(which), -1, -1)), dim=2)


def _view(segment: Segment, b: int, num_heads: int) -> _View:
    """Gather what sequence ``b`` holds of a segment, per head, padded to the longest head."""
    if segment.sealed is not None:
        return _sealed_view(segment, b)
    block_size = segment.keys.shape[1]
    lengths = segment.lengths[b].long().expand(num_heads) if segment.whole_blocks else segment.lengths[b].long()
    table = segment.tables[b].long()
    index = torch.arange(int(lengths.max()), device=table.device)
    if segment.whole_blocks:
        heads = torch.arange(num_heads, device=table.device)[:, None]
        pages = table[index // block_size] * segment.page_stride + segment.page_offset + heads
    else:
        # Heads shorter than the longest may have no table entry there: page 0 stands in, its slots are invisible.
        pages = torch.where(index < lengths[:, None], table[:, index // block_size], 0)
    slots = pages * block_size + index % block_size
    positions = index.expand_as(slots) if segment.positions is None else segment.positions.flatten()[slots].long()
    used = (index < lengths[:, None])[..., None]
    keys, values = (
        torch.where(used, arena.flatten(0, 1)[slots].float(), 0.0) for arena in (segment.keys, segment.values)
    )
    return _View(keys, values, slots, lengths[:, None, None], positions[:, None, :], segment)


def _sealed_view(segment: Segment, b: int) -> _View:
    rows = sealed_rows(segment, b)
    lengths = segment.lengths[b].long()[:, None, None]
    return _View(
        rows.keys,
        rows.values,
        rows.open_slots,
        lengths,
        rows.positions[:, None, :],
        segment,
        rows.sealed_slots,
        rows.in_sealed,
    )


def _grouped(queries: Tensor, num_heads: int) -> Tensor:
    """[n, Hq, Dk] to float32 [H, n, G, Dk]: the G heads that read one KV head side by side."""
    num_rows, num_query_heads, dim = queries.shape
    return queries.float().view(num_rows, num_heads, num_query_heads // num_heads, dim).permute(1, 0, 2, 3)


def _logits(grouped: Tensor, view: _View, look: _Look) -> Tensor:
    """Logits [H, n, G, S] of some query rows over one view, -inf where a key is invisible."""
    logits = torch.einsum("hngd,hsd->hngs", grouped, view.keys) * look.scale
    if look.softcap is not None:
        logits = look.softcap * torch.tanh(logits / look.softcap)
    slot = torch.arange(view.keys.shape[1], device=logits.device)
    own = view.lengths - look.num_queries + look.index[None, :, None]
    limit = own + 1 if view.segment.causal else view.lengths
    visible = slot < torch.minimum(limit, view.lengths)
    if look.window is not None:
        at = own if look.positions is None else look.positions[None, :, None]
        distance = at - view.positions
        visible = visible & (distance >= 0) & (distance < look.window)
    return logits.masked_fill(~visible[:, :, None, :], -math.inf)


def _softmax(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Log-sum-exp [H, n, G] over all views together, and each view's share of the probabilities."""
    total = torch.logsumexp(torch.cat(logits, dim=-1), dim=-1)
    # A row that sees nothing has total -inf; 0 in its place keeps its probabilities at 0.
    shift = torch.where(total == -math.inf, 0.0, total)[..., None]
    return total, [torch.exp(part - shift) for part in logits]


def _receive(view: _View, received: Tensor, b: int) -> None:
    """Add what each slot received, [H, S], to its column, or note who looked at it."""
    sealed, marks = view.segment.sealed, view.segment.marks
    columns = [(view.segment.mass, view.slots, None if view.in_sealed is None else ~view.in_sealed)]
    if sealed is not None and view.sealed_slots is not None:
        columns.append((sealed.mass, view.sealed_slots, view.in_sealed))
    used = torch.arange(received.shape[1], device=received.device) < view.lengths[:, :, 0]
    if marks is not None:
        used = used & (received >= marks.bound[b, :, None])
    for mass, slots, mine in columns:
        if mass is None:
            continue
        chosen = used if mine is None else used & mine
        if marks is None:
            mass.view(-1).index_add_(0, slots[chosen], received[chosen])
        else:
            mass.view(-1)[slots[chosen]] = marks.position[b]
