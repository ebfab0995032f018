"""Packed pages in plain torch: what `seal_*`, `unseal` and attention over sealed segments mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels.base import Sealed, Segment
from kvwise.kernels.packed import Codes, PackedArena, Plain, code_shape, pack, unpack


@dataclass(frozen=True, slots=True)
class SealedRows:
    """What one sequence sees of a segment with packed pages, per head, padded to the longest of S tokens."""

    keys: Tensor  # float32 [H, S, Dk]; channels that were not kept are 0
    values: Tensor  # float32 [H, S, Dv]
    positions: Tensor  # int64 [H, S]
    open_slots: Tensor  # int64 [H, S], where not in_sealed
    sealed_slots: Tensor  # int64 [H, S], where in_sealed
    in_sealed: Tensor  # bool [H, S]: whether the key is packed


def sealed_rows(segment: Segment, b: int) -> SealedRows:
    """Gather what sequence ``b`` holds of a segment with packed pages."""
    sealed = segment.sealed
    if sealed is None:
        raise UsageError("the segment has no packed pages")
    lengths = segment.lengths[b].long()
    index = torch.arange(int(lengths.max()), device=lengths.device)
    used = index < lengths[:, None]
    in_sealed = used & (index < sealed.key_lengths[b].long()[:, None])
    values_sealed = used & (index < sealed.value_lengths[b].long()[:, None])
    page_tokens = sealed.arena.format.page_tokens
    sealed_slots = _slots(sealed.tables[b].long(), index.expand_as(used), in_sealed | values_sealed, page_tokens)
    local = index - sealed.open_base[b].long()[:, None]
    open_slots = _slots(segment.tables[b].long(), local, used & (local >= 0), segment.keys.shape[1])
    keys, values = unpack_slots(sealed, b, sealed_slots)
    open_keys, open_values = (x.flatten(0, 1)[open_slots].float() for x in (segment.keys, segment.values))
    positions = torch.where(
        in_sealed, _positions(sealed.positions, sealed_slots, index), _positions(segment.positions, open_slots, index)
    )
    return SealedRows(
        torch.where(in_sealed[..., None], keys, torch.where(used[..., None], open_keys, 0.0)),
        torch.where(values_sealed[..., None], values, torch.where(used[..., None], open_values, 0.0)),
        positions,
        open_slots,
        sealed_slots,
        in_sealed,
    )


def _slots(table: Tensor, index: Tensor, used: Tensor, size: int) -> Tensor:
    """Slots int64 [H, S] of indices in table order; where not used slot 0 stands in."""
    if not table.shape[1]:
        return torch.zeros_like(index)
    entry = torch.where(used, index // size, 0)
    return torch.where(used, table.gather(1, entry) * size + index % size, 0)


def _positions(column: Tensor | None, slots: Tensor, index: Tensor) -> Tensor:
    return index.expand_as(slots) if column is None else column.flatten()[slots].long()


def unpack_slots(sealed: Sealed, b: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """float32 keys [H, S, head dim] and values [H, S, head dim] at packed slots int64 [H, S] of sequence ``b``."""
    page = sealed.arena.format
    if not sealed.arena.num_pages:
        zeros = torch.zeros(*slots.shape, page.head_dim)
        return zeros, zeros
    pages, where = torch.unique(slots // page.page_tokens, return_inverse=True)
    at = where * page.page_tokens + slots % page.page_tokens
    keys, values = _unseal(sealed.arena, pages, upper_only=sealed.upper_only)
    keys, values = keys.flatten(0, 1)[at], values.flatten(0, 1)[at]
    if sealed.key_channels is None:
        return keys, values
    channels = sealed.key_channels[b].long()[:, None, :].expand_as(keys)
    return keys.new_zeros(*slots.shape, page.head_dim).scatter_(2, channels, keys), values


def _unseal(packed: PackedArena, pages: Tensor, *, upper_only: bool = False) -> tuple[Tensor, Tensor]:
    page = packed.format
    rows = packed.gather(pages)
    keys, values = rows[:, : page.key_bytes], rows[:, page.key_bytes :]
    return (
        unpack(keys, page.keys, page.page_tokens, page.head_dim, upper_only=upper_only),
        unpack(values, page.values, page.page_tokens, page.head_dim, upper_only=upper_only),
    )


class ReferenceSealing:
    """Making and reading packed pages in plain torch; see `kvwise.kernels.base.Kernels` for what each must do."""

    def seal_keys(
        self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor, channels: Tensor | None = None
    ) -> None:
        """See `Kernels.seal_keys`."""
        check_seal(arena, slots, packed, pages, channels)
        rows = arena.flatten(0, 1)[slots]
        if channels is not None:
            rows = rows.gather(2, channels[:, None, :].expand(*rows.shape[:2], channels.shape[1]))
        packed.scatter(pack(rows, packed.format.keys), pages)

    def seal_values(self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor) -> None:
        """See `Kernels.seal_values`."""
        check_seal(arena, slots, packed, pages, None, values=True)
        rows = arena.flatten(0, 1)[slots]
        packed.scatter(pack(rows, packed.format.values), pages, packed.format.key_bytes)

    def seal_value_rows(self, arena: Tensor, slots: Tensor, packed: PackedArena, packed_slots: Tensor) -> None:
        """See `Kernels.seal_value_rows`."""
        check_seal_rows(arena, slots, packed, packed_slots)
        page, part = packed.format, packed.format.values
        rows = arena.flatten(0, 1)[slots]
        pages, where = torch.unique(packed_slots // page.page_tokens, return_inverse=True)
        # Packed as pages of their own, the new rows bring codes, steps and zeros to where the old ones had theirs.
        fresh = rows.new_zeros(len(pages), page.page_tokens, page.head_dim)
        fresh[where, packed_slots % page.page_tokens] = rows
        mine = torch.zeros(len(pages), page.page_tokens, dtype=torch.bool, device=rows.device)
        mine[where, packed_slots % page.page_tokens] = True
        mask = _row_mask(packed, mine)
        held = packed.gather(pages)[:, page.key_bytes :]
        packed.scatter((pack(fresh, part) & mask) | (held & ~mask), pages, page.key_bytes)

    def unseal(self, packed: PackedArena, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.unseal`."""
        return _unseal(packed, pages)


def _row_mask(packed: PackedArena, mine: Tensor) -> Tensor:
    """Bits uint8 [n, value_bytes] of a values part that belong to the rows chosen by bool [n, S]."""
    page, part = packed.format, packed.format.values
    full = torch.zeros(len(mine), page.value_bytes, dtype=torch.uint8, device=mine.device)
    if isinstance(part, Plain):
        row = part.dim * part.dtype.itemsize
        full[:, : page.page_tokens * row] = mine.to(torch.uint8).mul(255).repeat_interleave(row, dim=1)
        return full
    if not isinstance(part, Codes):
        return full
    shape = code_shape(part, page.page_tokens, page.head_dim)
    chosen = torch.nn.functional.pad(mine.to(torch.uint8), (0, shape.padded_inner - shape.inner))
    at = 0
    for bits in part.planes:
        split = chosen.view(len(mine), -1, bits, 1, 8 // bits, 4) * (2**bits - 1)
        shifts = torch.arange(8 // bits, dtype=torch.uint8, device=mine.device)[:, None] * bits
        words = (split << shifts).sum(4, dtype=torch.uint8).expand(-1, -1, -1, shape.padded_lanes, -1)
        full[:, at : at + shape.plane_bytes(bits)] = words.flatten(1)
        at += shape.plane_bytes(bits)
    steps = chosen[:, None, :].expand(-1, 2 * shape.num_groups, -1).flatten(1)
    full[:, at : at + shape.step_bytes] = steps.repeat_interleave(2, dim=1) * 255
    return full


def check_seal(
    arena: Tensor,
    slots: Tensor,
    packed: PackedArena,
    pages: Tensor,
    channels: Tensor | None,
    *,
    values: bool = False,
) -> None:
    """Raise UsageError on shapes that `seal_keys` or `seal_values` cannot use."""
    page = packed.format
    if slots.shape != (len(pages), page.page_tokens) or arena.shape[2] != page.head_dim:
        raise UsageError(
            f"slots {tuple(slots.shape)} of rows of {arena.shape[2]} channels do not fill {len(pages)} pages of "
            f"{page.page_tokens} tokens and {page.head_dim} channels"
        )
    if values:
        return
    if channels is None and page.key_dim != page.head_dim:
        raise UsageError(f"packed keys keep {page.key_dim} of {page.head_dim} channels: pass channels= to say which")
    if channels is not None and channels.shape != (len(pages), page.key_dim):
        raise UsageError(f"channels {tuple(channels.shape)} must be {(len(pages), page.key_dim)}")
    if channels is not None and not isinstance(page.keys, Plain):
        raise UsageError("only plain keys keep chosen channels; codes and float8 hold all of them")


def check_seal_rows(arena: Tensor, slots: Tensor, packed: PackedArena, packed_slots: Tensor) -> None:
    """Raise UsageError where single rows of values cannot be packed."""
    page, part = packed.format, packed.format.values
    stands_alone = isinstance(part, Plain) or (isinstance(part, Codes) and part.axis == "token")
    if not stands_alone:
        raise UsageError(f"values in {part} share scales over tokens: seal whole pages with seal_values")
    if slots.shape != packed_slots.shape or arena.shape[2] != page.head_dim:
        raise UsageError(
            f"{len(slots)} rows of {arena.shape[2]} channels do not fit {len(packed_slots)} packed rows of "
            f"{page.head_dim}"
        )
