"""Packed pages as Triton kernels read and write them; `kvwise.kernels.packed` says how their bytes lie.

Everything here works on tiles: N tokens of one page from its row `first` on (a multiple of N), so that where a tile
lies is one scalar, and words of codes are loaded once and cut into numbers in registers.
"""

# triton ships no types, and what a kernel takes (pointers, compile-time constants) Python's types cannot say.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from kvwise.core.errors import UsageError
from kvwise.kernels.packed import UNIT, Codes, Float8, PackedArena, Part, Plain

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILE = 64  # tokens of a tile at most


@triton.jit
def page_at(first_half, second_half, page, per_half, half_bytes, PAGE_BYTES: tl.constexpr):
    """Where packed page `page`, int64, begins."""
    within = page % (2 * per_half)
    half = tl.where(within < per_half, first_half, second_half)
    return half + page // (2 * per_half) * half_bytes + within % per_half * PAGE_BYTES


@triton.jit
def tiles_before(tokens, S: tl.constexpr, NP: tl.constexpr):
    """Packed tiles that end at or before a token."""
    return tokens // S * ((S + NP - 1) // NP) + tokens % S // NP


@triton.jit
def tiles_up_to(tokens, S: tl.constexpr, NP: tl.constexpr):
    """Packed tiles that hold the first `tokens` tokens."""
    return tokens // S * ((S + NP - 1) // NP) + (tokens % S + NP - 1) // NP


@triton.jit
def packed_tile(tile, table, key_length, S: tl.constexpr, NP: tl.constexpr):
    """Page of a packed tile, its first row, and of each row: number, token and whether a packed key is there."""
    CHUNKS: tl.constexpr = (S + NP - 1) // NP
    page = tl.load(table + tile // CHUNKS).to(tl.int64)
    first = tile % CHUNKS * NP
    row = first + tl.arange(0, NP)
    index = tile // CHUNKS * S + row
    return page, first, row, index, (row < S) & (index < key_length)


@triton.jit
def _plane(
    plane, first, BITS: tl.constexpr, BY_TOKEN: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """int32 [N, D] of one plane. Bits of number i of a word of 32 // BITS come from its byte i % 4."""
    i = tl.arange(0, 32 // BITS)
    shift = i % 4 * 8 + i // 4 * BITS
    words = plane.to(tl.pointer_type(tl.int32))
    if BY_TOKEN:
        word = first // 32 * BITS + tl.arange(0, N // 32 * BITS)
        lane = tl.arange(0, D)
        inside = (word[:, None] < INNER // 32 * BITS) & (lane[None, :] < LANES)
        found = tl.load(words + word[:, None] * LANES + lane[None, :], mask=inside, other=0)
        codes = found[:, None, :] >> shift[None, :, None]
    else:
        word = tl.arange(0, D // 32 * BITS)
        lane = first + tl.arange(0, N)
        inside = (word[None, :] < INNER // 32 * BITS) & (lane[:, None] < LANES)
        found = tl.load(words + word[None, :] * LANES + lane[:, None], mask=inside, other=0)
        codes = found[:, :, None] >> shift[None, None, :]
    return tl.reshape(codes & ((1 << BITS) - 1), [N, D])


@triton.jit
def _all_planes(
    part, first, BITS: tl.constexpr, SPLIT: tl.constexpr, UPPER: tl.constexpr, BY_TOKEN: tl.constexpr,
    LANES: tl.constexpr, INNER: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Codes int32 [N, D]; split ones as 16 u + l, or u alone."""
    SIZE: tl.constexpr = LANES * INNER // 8  # bytes of one bit of all numbers
    codes = tl.zeros([N, D], tl.int32)
    if SPLIT:
        codes = _plane(part, first, 4, BY_TOKEN, LANES, INNER, N, D)
        if not UPPER:
            codes = codes * 16 + _plane(part + 4 * SIZE, first, 4, BY_TOKEN, LANES, INNER, N, D) - 8
    else:
        if BITS & 8:
            codes = _plane(part, first, 8, BY_TOKEN, LANES, INNER, N, D)
        if BITS & 4:
            codes = _plane(part, first, 4, BY_TOKEN, LANES, INNER, N, D)
        if BITS & 2:
            codes = codes * 4 + _plane(part + (BITS & 4) * SIZE, first, 2, BY_TOKEN, LANES, INNER, N, D)
        if BITS & 1:
            codes = codes * 2 + _plane(part + (BITS & 6) * SIZE, first, 1, BY_TOKEN, LANES, INNER, N, D)
    return codes


@triton.jit
def _codes(
    part, first, row, used, BITS: tl.constexpr, SPLIT: tl.constexpr, UPPER: tl.constexpr, BY_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Numbers float32 [N, D] of codes; steps and zeros are loaded once a group where groups and tiles fit."""
    LANES: tl.constexpr = ((DIM if BY_TOKEN else S) + 15) // 16 * 16
    INNER: tl.constexpr = ((S if BY_TOKEN else DIM) + 31) // 32 * 32
    codes = _all_planes(part, first, BITS, SPLIT, UPPER, BY_TOKEN, LANES, INNER, N, D)
    steps = (part + BITS * (LANES * INNER // 8)).to(tl.pointer_type(tl.float16))
    if BY_TOKEN:
        WIDTH: tl.constexpr = D if GROUP >= DIM else (GROUP if D % GROUP == 0 else 1)
        lane = tl.arange(0, D // WIDTH) * WIDTH
        at = lane[None, :] // GROUP * (2 * INNER) + row[:, None]
        inside = used[:, None] & (lane[None, :] < DIM)  # the steps of rows not yet written may be nan
        step = tl.load(steps + at, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(steps + at + INNER, mask=inside, other=0.0).to(tl.float32)
        step = tl.reshape(tl.broadcast_to(step[:, :, None], [N, D // WIDTH, WIDTH]), [N, D])
        zero = tl.reshape(tl.broadcast_to(zero[:, :, None], [N, D // WIDTH, WIDTH]), [N, D])
    else:
        HEIGHT: tl.constexpr = N if GROUP % N == 0 else (GROUP if N % GROUP == 0 else 1)
        lane = first + tl.arange(0, N // HEIGHT) * HEIGHT
        d = tl.arange(0, D)
        at = lane[:, None] // GROUP * (2 * INNER) + d[None, :]
        inside = (lane[:, None] < S) & (d[None, :] < INNER)
        step = tl.load(steps + at, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(steps + at + INNER, mask=inside, other=0.0).to(tl.float32)
        step = tl.reshape(tl.broadcast_to(step[:, None, :], [N // HEIGHT, HEIGHT, D]), [N, D])
        zero = tl.reshape(tl.broadcast_to(zero[:, None, :], [N // HEIGHT, HEIGHT, D]), [N, D])
    if SPLIT and not UPPER:
        step = step * 0.0625
    # Of groups along tokens some rows may be read, others not (theirs are open).
    return tl.where(used[:, None], codes.to(tl.float32) * step + zero, 0.0)


@triton.jit
def read_part(
    part, first, row, used, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    TYPE: tl.constexpr, UPPER: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Numbers float32 [N, D] of the tile from row `first` on, 0 where not `used`; `row` is first, first + 1, ..."""
    if KIND == "plain" or KIND == "float8":
        d = tl.arange(0, D)
        at = row[:, None] * DIM + d[None, :]
        inside = used[:, None] & (d[None, :] < DIM)
        if KIND == "plain":
            numbers = tl.load(part.to(tl.pointer_type(TYPE)) + at, mask=inside, other=0.0).to(tl.float32)
        else:
            # e4m3 bits moved into float16 read 256 times too small, its subnormals too: no float8 type is needed.
            byte = tl.load(part + at, mask=inside, other=0).to(tl.int32)
            half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.uint16)
            scale = tl.load((part + S * DIM).to(tl.pointer_type(tl.float32)))
            numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)
    else:
        numbers = _codes(part, first, row, used, BITS, SPLIT, UPPER, KIND == "token", GROUP, S, DIM, N, D)
    return numbers


@triton.jit
def copy_pages(
    rows, pages, first_half, second_half, per_half, half_bytes, first_word, num_words, PAGE_BYTES: tl.constexpr,
    STORE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Words [n, num_words] from (or, with STORE, to) word `first_word` on of packed pages int64 [n]."""
    n = tl.program_id(0).to(tl.int64)
    page = page_at(first_half, second_half, tl.load(pages + n), per_half, half_bytes, PAGE_BYTES)
    held = page.to(tl.pointer_type(tl.int32)) + first_word
    word = tl.program_id(1) * N + tl.arange(0, N)
    inside = word < num_words
    if STORE:
        tl.store(held + word, tl.load(rows + n * num_words + word, mask=inside), mask=inside)
    else:
        tl.store(rows + n * num_words + word, tl.load(held + word, mask=inside), mask=inside)


@triton.jit
def put_rows(
    rows, packed_slots, first_half, second_half, per_half, half_bytes, PAGE_BYTES: tl.constexpr, START: tl.constexpr,
    TYPE: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token's numbers of type TYPE, [DIM], into a plain part."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(packed_slots + n)
    part = page_at(first_half, second_half, slot // S, per_half, half_bytes, PAGE_BYTES) + START
    d = tl.arange(0, D)
    row = tl.load(rows + n * DIM + d, mask=d < DIM)
    tl.store(part.to(tl.pointer_type(TYPE)) + slot % S * DIM + d, row, mask=d < DIM)


@triton.jit
def put_codes(
    codes, steps, packed_slots, first_half, second_half, per_half, half_bytes, PAGE_BYTES: tl.constexpr,
    START: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr,
    DIM: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token's codes uint8 [planes, DIM] and steps float16 [GROUPS, 2] into a part by token.

    A word holds bits of other tokens too, which other programs may be putting: each program turns its own bits alone.
    """
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(packed_slots + n)
    row = slot % S
    part = page_at(first_half, second_half, slot // S, per_half, half_bytes, PAGE_BYTES) + START
    LANES: tl.constexpr = (DIM + 15) // 16 * 16
    INNER: tl.constexpr = (S + 31) // 32 * 32
    SIZE: tl.constexpr = LANES * INNER // 8
    mine = codes + n * (2 if SPLIT else (BITS & 1) + (BITS >> 1 & 1) + (BITS >> 2 & 1) + (BITS >> 3)) * DIM
    if SPLIT:
        _turn(mine, part, row, 4, LANES, DIM, D)
        _turn(mine + DIM, part + 4 * SIZE, row, 4, LANES, DIM, D)
    else:
        if BITS & 8:
            _turn(mine, part, row, 8, LANES, DIM, D)
        if BITS & 4:
            _turn(mine, part, row, 4, LANES, DIM, D)
        if BITS & 2:
            _turn(mine + (BITS >> 2 & 1) * DIM, part + (BITS & 4) * SIZE, row, 2, LANES, DIM, D)
        if BITS & 1:
            before: tl.constexpr = (BITS >> 2 & 1) + (BITS >> 1 & 1)
            _turn(mine + before * DIM, part + (BITS & 6) * SIZE, row, 1, LANES, DIM, D)
    i = tl.arange(0, G)
    held = (part + BITS * SIZE).to(tl.pointer_type(tl.float16))
    found = tl.load(steps + n * (2 * GROUPS) + i, mask=i < 2 * GROUPS)
    tl.store(held + i * INNER + row, found, mask=i < 2 * GROUPS)


@triton.jit
def _turn(codes, plane, row, BITS: tl.constexpr, LANES: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    """Make the bits of token `row` in one plane those of uint8 codes [DIM], 0 in the lanes behind."""
    within = row % 32
    quad = within // 4
    shift = (within % 4 * 8 + quad % (8 // BITS) * BITS).to(tl.int32)
    d = tl.arange(0, D)
    words = plane.to(tl.pointer_type(tl.int32)) + (row // 32 * BITS + quad // (8 // BITS)) * LANES + d
    wanted = tl.load(codes + d, mask=d < DIM, other=0).to(tl.int32)
    held = tl.load(words, mask=d < LANES, other=0)
    changed = ((held >> shift) ^ wanted) & ((1 << BITS) - 1)
    tl.atomic_xor(words, changed << shift, mask=d < LANES)


def tile_tokens(packed: PackedArena) -> int:
    """Tokens of a tile: a power of two of at least 16 (`tl.dot`), and of 32 where codes come in units of 32."""
    parts = (packed.format.keys, packed.format.values)
    least = UNIT if any(isinstance(part, Codes) for part in parts) else 16
    return max(least, min(TILE, int(triton.next_power_of_2(packed.format.page_tokens))))


def part_constants(prefix: str, part: Part, head_dim: int) -> dict[str, Any]:
    """What `read_part` wants to know of a part, by names that begin with `prefix`."""
    codes = part if isinstance(part, Codes) else None
    kind = codes.axis if codes is not None else "float8" if isinstance(part, Float8) else "plain"
    return {
        f"{prefix}_KIND": kind,
        f"{prefix}_BITS": codes.bits if codes is not None else 0,
        f"{prefix}_GROUP": min(codes.group, head_dim) if kind == "token" and codes is not None else
        codes.group if codes is not None else 0,
        f"{prefix}_SPLIT": codes is not None and codes.split,
        f"{prefix}_TYPE": TYPES[part.dtype] if isinstance(part, Plain) else tl.float32,
    }  # fmt: skip


def memory_of(packed: PackedArena) -> dict[str, Any]:
    """Where packed pages lie; raises UsageError where their words would not lie on multiples of 4 bytes."""
    page, (first, second) = packed.format, packed.halves
    scales = [page.page_tokens * page.head_dim for part in (page.keys, page.values) if isinstance(part, Float8)]
    if first.shape[1] % 4 or any(at % 4 for at in scales) or first.data_ptr() % 4 or second.data_ptr() % 4:
        raise UsageError(
            f"pages are read by words of 4 bytes: half a block of {first.shape[1]} bytes and {page.page_tokens} tokens "
            f"of {page.head_dim} channels in float8 must be multiples of 4"
        )
    return {
        "first_half": first,
        "second_half": second,
        "per_half": packed.per_half,
        "half_bytes": first.shape[1],
        "PAGE_BYTES": page.page_bytes,
    }
