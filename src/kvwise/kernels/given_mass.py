"""The mass that rows give whose log-sum-exp is known already: plain torch on any device, a few rows at a time."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels.base import Segment, check_attend

ROWS = 256  # query rows at once: logits held are ROWS x keys


class GivenMass:
    """`Kernels.add_mass`, for every family."""

    def add_mass(
        self,
        queries: Tensor,
        query_start: Tensor,
        segments: Sequence[Segment],
        lse: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        """See `Kernels.add_mass`."""
        num_heads = check_attend(queries, query_start, segments, None)
        group = queries.shape[1] // num_heads
        if lse.shape != queries.shape[:2]:
            raise UsageError(f"lse {tuple(lse.shape)} must be {tuple(queries.shape[:2])}, one of every query")
        if any(segment.whole_blocks or segment.sealed is not None for segment in segments):
            raise UsageError("mass of a given log-sum-exp is added to open pages per head only")
        bounds = query_start.tolist()
        counts = {last - first for first, last in itertools.pairwise(bounds)}
        if counts == {1}:  # a decode step: all sequences at once
            pieces = [(slice(bounds[0], bounds[-1]), slice(0, len(bounds) - 1), 0)]
        else:
            pieces = [
                (slice(start, min(start + ROWS, last)), slice(b, b + 1), last - start)
                for b, (first, last) in enumerate(itertools.pairwise(bounds))
                for start in range(first, last, ROWS)
            ]
        for rows, which, num_left in pieces:
            count = which.stop - which.start
            grouped = queries[rows].float().reshape(count, -1, num_heads, group, queries.shape[2])
            known = lse[rows].reshape(grouped.shape[:-1])
            for segment in segments:
                if segment.mass is not None:
                    _add(grouped.permute(0, 2, 3, 1, 4), known.permute(0, 2, 3, 1), segment, which, num_left, scale,
                         softcap)  # fmt: skip


def _add(
    queries: Tensor, lse: Tensor, segment: Segment, which: slice, num_left: int, scale: float, softcap: float | None
) -> None:
    """Queries [B, H, G, n, D] and lse [B, H, G, n] of the sequences `which`; `num_left` rows from the first on."""
    assert segment.mass is not None
    size, lengths = segment.keys.shape[1], segment.lengths[which]
    longest = int(lengths.max())
    if not longest:
        return
    pages = segment.tables[which][..., : -(-longest // size)].long()
    entry = torch.arange(pages.shape[-1], device=pages.device) * size
    pages = torch.where(entry < lengths[..., None], pages, 0)
    keys = segment.keys[pages].flatten(2, 3).float()  # [B, H, S, D]
    logits = queries.flatten(2, 3) @ keys.transpose(-1, -2)  # [B, H, G * n, S]
    logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # A row that sees nothing has lse -inf; with inf in its place it gives nothing.
    known = lse.masked_fill(lse == -torch.inf, torch.inf).flatten(2)
    given = logits.sub_(known[..., None]).exp_().view(*lse.shape, -1)
    slot = torch.arange(given.shape[-1], device=keys.device)
    if segment.causal and queries.shape[3] > 1:
        row = torch.arange(queries.shape[3], device=keys.device)[:, None]
        seen = slot <= lengths[..., None, None] - num_left + row
        given.masked_fill_(~seen[:, :, None], 0.0)
    elif segment.causal and num_left > 1:
        given.masked_fill_((slot > lengths[..., None] - num_left)[:, :, None, None], 0.0)
    received = given.sum((2, 3))
    used = slot < lengths[..., None]
    slots = (pages[..., None] * size + torch.arange(size, device=pages.device)).flatten(2)
    segment.mass.view(-1).index_add_(0, slots[used], received[used])
