"""Packed pages: keys and values of `page_tokens` tokens of one head in codes, and the plain torch that (un)packs them.

A packed page is the bytes of its keys, then of its values, each part ending on a multiple of 64 bytes. A part in
`Float8` or `Plain` holds rows [S, dim]. A part in `Codes` is laid out for integer dot products, four numbers at once:

* *lanes* are the numbers that share steps: tokens if the axis is "channel", channels if it is "token"; *inner* is the
  other axis. Both are padded, lanes to 16, inner to 32, with codes 0.
* Codes are cut into planes of 8, 4, 2 and 1 bits (as `bits` has them set; 8 bits are one plane, split ones two of 4).
  Of 32 inner numbers a plane of b bits holds ``[b][lanes][4]`` bytes: bits ``s * b`` of byte ``j`` of word ``w`` are
  inner number ``(w * (8 // b) + s) * 4 + j``. A plane is ``[inner // 32]`` of these; planes follow each other, the
  highest bits first.
* Then steps and zeros, float16 ``[lanes // group][2][inner]``.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kvwise.core.errors import UsageError

ALIGNMENT = 64  # bytes a part is padded to
LANES = 16  # lanes of a coded part are padded to this
UNIT = 32  # and its inner axis to this
LARGEST_FLOAT8 = 448.0
LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Codes:
    """Integer codes of really `bits` bits with affine groups: ``x = code * step + zero``.

    Axis "channel": one (step, zero) per channel and `group` consecutive tokens; "token": per token and `group`
    consecutive channels (a group larger than the head means all its channels). Both are float16, rounded before the
    codes are made (KIVI, arXiv 2402.02750, section 3.2).

    `split` (QuantSpec, arXiv 2502.10424): 8 bits as an upper asymmetric code ``u`` of 4 bits with step ``s`` and a
    lower symmetric one ``l`` in -8..7 with step ``s / 16``: ``x = (16 u + l) * (s / 16) + zero``, and the upper plane
    alone reads ``u * s + zero``.
    """

    bits: int
    axis: Literal["channel", "token"]
    group: int
    split: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"codes have 1 to 8 bits, got {self.bits}")
        if self.axis not in ("channel", "token"):
            raise UsageError(f"groups of codes run along 'channel' or 'token', got {self.axis!r}")
        if self.group < 1:
            raise UsageError(f"a group of codes has at least one number, got {self.group}")
        if self.split and self.bits != 8:
            raise UsageError(f"split codes are 4 upper and 4 lower bits: pass bits=8, not {self.bits}")

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, highest first."""
        if self.split:
            return 4, 4
        return tuple(bits for bits in (8, 4, 2, 1) if self.bits & bits)

    @property
    def levels(self) -> int:
        """Steps between a group's smallest and largest number."""
        return 15 if self.split else 2**self.bits - 1


@dataclass(frozen=True, slots=True)
class Float8:
    """e4m3 numbers (finite, saturating at 448) with one float32 scale per page: largest magnitude / 448, 1 if 0."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Native numbers, `dim` channels a row (ThinK, arXiv 2407.21018: fewer than the head's); rows stand alone."""

    dtype: torch.dtype
    dim: int

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UsageError(f"plain parts hold float32, bfloat16 or float16, got {self.dtype}")
        if self.dim < 1:
            raise UsageError(f"a plain part needs at least one channel, got {self.dim}")


Part = Codes | Float8 | Plain


@dataclass(frozen=True, slots=True)
class CodeShape:
    """How a part of `Codes` lies in memory; see the module's own text."""

    lanes: int
    inner: int
    group: int  # lanes that share steps
    padded_lanes: int
    padded_inner: int

    @property
    def num_groups(self) -> int:
        """Runs of lanes that share steps."""
        return self.lanes // self.group

    def plane_bytes(self, bits: int) -> int:
        """Bytes of one plane."""
        return self.padded_lanes * self.padded_inner * bits // 8

    @property
    def step_bytes(self) -> int:
        """Bytes of all steps and zeros."""
        return self.num_groups * self.padded_inner * 4


def code_shape(part: Codes, page_tokens: int, dim: int) -> CodeShape:
    """Layout of a part; raises UsageError if groups do not fill the page."""
    lanes, inner = (page_tokens, dim) if part.axis == "channel" else (dim, page_tokens)
    group = min(part.group, dim) if part.axis == "token" else part.group
    if lanes % group:
        whole = f"{lanes} tokens of a page" if part.axis == "channel" else f"{lanes} channels of a head"
        raise UsageError(f"groups of {group} do not divide the {whole}")
    return CodeShape(lanes, inner, group, -(-lanes // LANES) * LANES, -(-inner // UNIT) * UNIT)


@dataclass(frozen=True, slots=True)
class PageFormat:
    """What one packed page holds: keys and values of `page_tokens` tokens of one head of `head_dim` channels."""

    keys: Part
    values: Part
    page_tokens: int
    head_dim: int
    key_bytes: int = field(init=False, repr=False, compare=False)  # of the keys' part, a multiple of 64
    value_bytes: int = field(init=False, repr=False, compare=False)  # likewise; both are asked for at every call

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.head_dim < 1:
            raise UsageError(f"a page needs tokens and channels, got {self.page_tokens} and {self.head_dim}")
        for name, part in (("key_bytes", self.keys), ("value_bytes", self.values)):
            object.__setattr__(self, name, part_bytes(part, self.page_tokens, self.head_dim))
        if isinstance(self.values, Plain) and self.values.dim != self.head_dim:
            raise UsageError(f"plain values keep all {self.head_dim} channels, got {self.values.dim}")
        if isinstance(self.keys, Plain) and self.keys.dim > self.head_dim:
            raise UsageError(f"plain keys keep at most {self.head_dim} channels, got {self.keys.dim}")

    @property
    def key_dim(self) -> int:
        """Channels of a key as packed."""
        return self.keys.dim if isinstance(self.keys, Plain) else self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.key_bytes + self.value_bytes

    @property
    def bits_per_element(self) -> float:
        """All bytes of a page over the numbers it stands for: steps, scales, dropped channels and padding count."""
        return self.page_bytes * 8 / (2 * self.page_tokens * self.head_dim)


def part_bytes(part: Part, page_tokens: int, head_dim: int) -> int:
    """Bytes of one part of a page."""
    if isinstance(part, Codes):
        shape = code_shape(part, page_tokens, head_dim)
        used = sum(shape.plane_bytes(bits) for bits in part.planes) + shape.step_bytes
    elif isinstance(part, Float8):
        used = page_tokens * head_dim + 4
    else:
        used = page_tokens * part.dim * part.dtype.itemsize
    return -(-used // ALIGNMENT) * ALIGNMENT


def pack(rows: Tensor, part: Part) -> Tensor:
    """Rows [n, S, dim] of n pages (dim of the part) as uint8 [n, bytes of the part]."""
    _, page_tokens, dim = rows.shape
    if isinstance(part, Codes):
        pieces = _pack_codes(rows.float(), part)
    elif isinstance(part, Float8):
        scale = rows.float().abs().amax((1, 2)) / LARGEST_FLOAT8
        scale = torch.where(scale == 0, 1.0, scale)
        scaled = (rows.float() * (1 / scale)[:, None, None]).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        pieces = [_bytes(scaled.to(torch.float8_e4m3fn)), _bytes(scale[:, None])]
    else:
        pieces = [_bytes(rows.to(part.dtype))]
    packed = torch.cat(pieces, 1)
    padding = part_bytes(part, page_tokens, dim) - packed.shape[1]
    return torch.nn.functional.pad(packed, (0, padding)) if padding else packed


def unpack(packed: Tensor, part: Part, page_tokens: int, head_dim: int, *, upper_only: bool = False) -> Tensor:
    """float32 rows [n, S, dim of the part] of uint8 [n, bytes of the part].

    `upper_only` reads split codes by their upper plane; parts that are not split have only one reading.
    """
    n = packed.shape[0]
    if isinstance(part, Codes):
        return _unpack_codes(packed, part, code_shape(part, page_tokens, head_dim), upper_only=upper_only)
    if isinstance(part, Float8):
        used = page_tokens * head_dim
        scale = packed[:, used : used + 4].contiguous().view(torch.float32)
        numbers = packed[:, :used].contiguous().view(torch.float8_e4m3fn).float()
        return numbers.view(n, page_tokens, head_dim) * scale[:, :, None]
    used = page_tokens * part.dim * part.dtype.itemsize
    return packed[:, :used].contiguous().view(part.dtype).view(n, page_tokens, part.dim).float()


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8).flatten(1)


def _pack_codes(rows: Tensor, part: Codes) -> list[Tensor]:
    shape = code_shape(part, rows.shape[1], rows.shape[2])
    lanes = rows if part.axis == "channel" else rows.transpose(1, 2)
    grouped = lanes.reshape(len(rows), shape.num_groups, shape.group, shape.inner)
    step, zero, inverse = _affine(grouped, part)
    scaled = (grouped - zero) * inverse
    codes = scaled.round().clamp(0, part.levels)
    planes = []
    if part.split:
        # The lower code is what the upper one leaves, in sixteenths of its step.
        rest = (grouped - (codes * step + zero)) * inverse * 16
        planes = [codes, rest.round().clamp(-8, 7) + 8]
    else:
        left = codes.int()
        for bits in reversed(part.planes):
            planes.insert(0, left & (2**bits - 1))
            left = left >> bits
    laid_out = [
        _lay_out(plane.to(torch.uint8).flatten(1, 2), bits, shape)
        for plane, bits in zip(planes, part.planes, strict=True)
    ]
    steps = torch.stack([step.squeeze(2), zero.squeeze(2)], 2).half()
    steps = torch.nn.functional.pad(steps, (0, shape.padded_inner - shape.inner))
    return [*laid_out, _bytes(steps)]


def affine_of(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step, zero (both rounded to float16) and the float32 inverse of the step (0 for step 0) of groups' ranges."""
    step = ((high - low) / levels).clamp(max=LARGEST_HALF).half().float()
    zero = low.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
    return step, zero, torch.where(step == 0, 0.0, 1.0 / step)


def _affine(grouped: Tensor, part: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Of [n, groups, lanes of a group, inner]: each [n, groups, 1, inner]."""
    return affine_of(grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True), part.levels)


def _lay_out(codes: Tensor, bits: int, shape: CodeShape) -> Tensor:
    """One plane's codes uint8 [n, lanes, inner] as bytes [n, plane_bytes]."""
    padding = (0, shape.padded_inner - shape.inner, 0, shape.padded_lanes - shape.lanes)
    codes = torch.nn.functional.pad(codes, padding)
    # [n, lanes, unit, word, shift, 4] to [n, unit, word, lanes, 4]
    split = codes.view(len(codes), shape.padded_lanes, -1, bits, 8 // bits, 4)
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=codes.device)[:, None] * bits
    words = (split << shifts).sum(4, dtype=torch.uint8)
    return words.permute(0, 2, 3, 1, 4).flatten(1)


def plane_codes(packed: Tensor, bits: int, shape: CodeShape) -> Tensor:
    """Codes uint8 [n, lanes, inner] of one plane's bytes [n, plane_bytes]."""
    words = packed.view(len(packed), -1, bits, shape.padded_lanes, 1, 4)
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)[:, None] * bits
    split = (words >> shifts) & (2**bits - 1)
    codes: Tensor = split.permute(0, 3, 1, 2, 4, 5).flatten(2)
    return codes[:, : shape.lanes, : shape.inner]


def _unpack_codes(packed: Tensor, part: Codes, shape: CodeShape, *, upper_only: bool) -> Tensor:
    codes, at = torch.zeros(1), 0
    for bits in part.planes:
        plane = packed[:, at : at + shape.plane_bytes(bits)].contiguous()
        at += plane.shape[1]
        if not (part.split and upper_only and at > plane.shape[1]):
            codes = codes * 2**bits + plane_codes(plane, bits, shape)
    steps = packed[:, at : at + shape.step_bytes].contiguous().view(torch.float16).float()
    steps = steps.view(len(packed), shape.num_groups, 2, 1, shape.padded_inner)[..., : shape.inner]
    step, zero = steps[:, :, 0], steps[:, :, 1]
    if part.split and not upper_only:
        codes, step = codes - 8, step / 16
    grouped = codes.reshape(len(packed), shape.num_groups, shape.group, shape.inner)
    rows = (grouped * step + zero).flatten(1, 2)
    return rows if part.axis == "channel" else rows.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class PackedArena:
    """Packed pages in the memory of blocks: each half of a block holds `per_half` pages, side by side from its start.

    Page ``p`` lies in block ``p // (2 * per_half)``; of its pages the first half are in ``halves[0]`` (where open
    blocks have their keys), the others in ``halves[1]``. Every page holds keys and values both.
    """

    halves: tuple[Tensor, Tensor]  # uint8 [num_blocks, half_bytes], contiguous
    format: PageFormat

    def __post_init__(self) -> None:
        for half in self.halves:
            if half.dtype != torch.uint8 or half.ndim != 2 or not half.is_contiguous():
                raise UsageError(f"a half is contiguous uint8 [blocks, bytes], got {tuple(half.shape)} {half.dtype}")
        if self.halves[0].shape != self.halves[1].shape:
            raise UsageError(f"halves differ: {tuple(self.halves[0].shape)} and {tuple(self.halves[1].shape)}")
        if not self.per_half:
            raise UsageError(
                f"a page of {self.format.page_bytes} bytes does not fit half a block of {self.halves[0].shape[1]}; "
                "use larger blocks, shorter pages or fewer bits"
            )

    @property
    def per_half(self) -> int:
        """Pages in one half of a block."""
        return int(self.halves[0].shape[1]) // self.format.page_bytes

    @property
    def num_pages(self) -> int:
        """Pages of all blocks."""
        return int(self.halves[0].shape[0]) * 2 * self.per_half

    def gather(self, pages: Tensor) -> Tensor:
        """Bytes uint8 [n, page_bytes] of int64 pages [n]."""
        out = self.halves[0].new_empty(len(pages), self.format.page_bytes)
        for half, view in enumerate(self._views()):
            block, lane, mine = self._places(pages, half)
            out[mine] = view[block, lane]
        return out

    def scatter(self, rows: Tensor, pages: Tensor, first: int = 0) -> None:
        """Write bytes uint8 [n, m] at byte `first` of int64 pages [n]; pages must differ."""
        for half, view in enumerate(self._views()):
            block, lane, mine = self._places(pages, half)
            view[block, lane, first : first + rows.shape[1]] = rows[mine]

    def _views(self) -> list[Tensor]:
        page = self.format.page_bytes
        blocks, half_bytes = self.halves[0].shape
        shape, strides = (blocks, self.per_half, page), (half_bytes, page, 1)
        return [half.as_strided(shape, strides) for half in self.halves]

    def _places(self, pages: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
        within = pages % (2 * self.per_half)
        mine = within // self.per_half == half
        return pages[mine] // (2 * self.per_half), within[mine] % self.per_half, mine
