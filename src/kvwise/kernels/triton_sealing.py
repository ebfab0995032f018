"""Making and reading packed pages on a GPU: torch packs rows to bytes, Triton moves bytes to and from their pages.

Nothing here waits for the device: no sizes are read back, as `torch.unique` or masks used as indices would.
"""

# triton ships no types.
# mypy: disable-error-code="import-untyped, import-not-found"

import torch
import triton
from torch import Tensor

from kvwise.kernels import triton_packed
from kvwise.kernels.packed import Codes, PackedArena, Plain, code_shape, pack, plane_codes, unpack
from kvwise.kernels.reference_sealed import check_seal, check_seal_rows
from kvwise.kernels.triton_packed import memory_of

WORDS = 1024  # words of a page that one program moves


class TritonSealing:
    """Sealing for `TritonKernels`; bytes are those of `pack`. See `kvwise.kernels.base.Kernels`."""

    def seal_keys(
        self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor, channels: Tensor | None = None
    ) -> None:
        """See `Kernels.seal_keys`."""
        check_seal(arena, slots, packed, pages, channels)
        rows = arena.flatten(0, 1)[slots]
        if channels is not None:
            rows = rows.gather(2, channels[:, None, :].expand(*rows.shape[:2], channels.shape[1]))
        _copy(pack(rows, packed.format.keys), packed, pages, 0, store=True)

    def seal_values(self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor) -> None:
        """See `Kernels.seal_values`."""
        check_seal(arena, slots, packed, pages, None, values=True)
        rows = pack(arena.flatten(0, 1)[slots], packed.format.values)
        _copy(rows, packed, pages, packed.format.key_bytes, store=True)

    def seal_value_rows(self, arena: Tensor, slots: Tensor, packed: PackedArena, packed_slots: Tensor) -> None:
        """See `Kernels.seal_value_rows`."""
        check_seal_rows(arena, slots, packed, packed_slots)
        page, part = packed.format, packed.format.values
        rows = arena.flatten(0, 1)[slots]
        if not len(rows):
            return
        if isinstance(part, Codes):
            _put_codes(rows, part, packed, packed_slots)
        elif isinstance(part, Plain):
            triton_packed.put_rows[(len(rows),)](
                rows.to(part.dtype),
                packed_slots,
                **memory_of(packed),
                START=page.key_bytes,
                TYPE=triton_packed.TYPES[part.dtype],
                S=page.page_tokens,
                DIM=part.dim,
                D=triton.next_power_of_2(part.dim),
                enable_fp_fusion=True,
            )

    def unseal(self, packed: PackedArena, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels.unseal`."""
        page = packed.format
        rows = torch.empty(len(pages), page.page_bytes, dtype=torch.uint8, device=packed.halves[0].device)
        _copy(rows, packed, pages, 0, store=False)
        keys, values = rows[:, : page.key_bytes], rows[:, page.key_bytes :]
        return (
            unpack(keys, page.keys, page.page_tokens, page.head_dim),
            unpack(values, page.values, page.page_tokens, page.head_dim),
        )


def _copy(rows: Tensor, packed: PackedArena, pages: Tensor, first: int, *, store: bool) -> None:
    """Bytes uint8 [n, m] to (or from) byte `first` on of pages int64 [n]; both multiples of 4."""
    words = rows.contiguous().view(torch.int32)
    if not words.numel():
        return
    triton_packed.copy_pages[(len(rows), triton.cdiv(words.shape[1], WORDS))](
        words, pages, **memory_of(packed), first_word=first // 4, num_words=words.shape[1], STORE=store, N=WORDS,
        enable_fp_fusion=True,
    )  # fmt: skip


def _put_codes(rows: Tensor, part: Codes, packed: PackedArena, packed_slots: Tensor) -> None:
    """Rows [n, D] as values of packed slots int64 [n]."""
    page = packed.format
    # Each row packed as a page of its own says what its codes and steps are.
    alone, shape = pack(rows[:, None], part), code_shape(part, 1, page.head_dim)
    planes, at = [], 0
    for bits in part.planes:
        plane = alone[:, at : at + shape.plane_bytes(bits)]
        planes.append(plane_codes(plane.contiguous(), bits, shape)[:, :, 0])
        at += plane.shape[1]
    steps = alone[:, at : at + shape.step_bytes].contiguous().view(torch.float16)
    triton_packed.put_codes[(len(rows),)](
        torch.stack(planes, 1),
        steps.view(len(rows), -1, shape.padded_inner)[:, :, 0].contiguous(),
        packed_slots,
        **memory_of(packed),
        START=page.key_bytes,
        BITS=part.bits,
        SPLIT=part.split,
        GROUPS=shape.num_groups,
        S=page.page_tokens,
        DIM=page.head_dim,
        G=triton.next_power_of_2(2 * shape.num_groups),
        D=triton.next_power_of_2(code_shape(part, page.page_tokens, page.head_dim).padded_lanes),
        enable_fp_fusion=True,
    )
