"""Range coding of small codes under given distributions: rANS with 32-bit states and 16-bit words.

The coder is Duda's range variant of asymmetric numeral systems (arXiv 1311.2540). Code i of a stream is coded by state
i % lanes, so that several states advance at once and share one run of words. A stream is the final states (uint32 each)
and then the words (uint16), both little-endian, in the order in which a decoder takes them. It ends exactly when all
states are back at where the encoder began, which a decoder checks.

The native code and the numpy reference here write the same bytes; without the native module the reference runs.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from kvwise.tiers.base import Buffer

Bytes = npt.NDArray[np.uint8]
Ends = npt.NDArray[np.int16]

BITS = 14
TOTAL = 1 << BITS  # slots that the codes of one distribution share
WIDTHS = (16, 32, 64)  # codes a distribution may have room for
_LOW = 1 << 16  # states stay in [_LOW, _LOW << 16)
_CODES_PER_LANE = 2048  # so the states cost about 0.012 bit a code
_MAX_LANES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Distributions, and which code has which.

    Codes lie in parts: part p is [rows[p], columns], all parts one after another. They are coded part by part, column
    by column, and column c of part p has distribution p * columns + c. `ends` [parts * columns, width]: where each
    code's slots end, of 2^14; a code whose end is that of the code before has none and cannot be coded.
    """

    ends: Ends
    rows: tuple[int, ...]
    columns: int

    @property
    def num_codes(self) -> int:
        """Codes in a stream."""
        return sum(self.rows) * self.columns

    @property
    def lanes(self) -> int:
        """States of a stream: each costs about 24 bits, so small streams have few of them."""
        wanted = min(_MAX_LANES, self.num_codes // _CODES_PER_LANE)
        return 1 << max(0, wanted.bit_length() - 1)


def width_for(num_codes: int) -> int:
    """Room that a distribution over so many codes needs. ValueError above 64."""
    for width in WIDTHS:
        if num_codes <= width:
            return width
    raise ValueError(f"{num_codes} codes are more than the {WIDTHS[-1]} that a distribution holds")


def ends_of(weights: npt.NDArray[np.float64], width: int) -> Ends:
    """Slots in proportion to `weights` [..., codes], at least one for each code, as ends [..., width].

    The codes beyond get none. Weights that are all zero are taken as equal.
    """
    num_codes = weights.shape[-1]
    sums = weights.sum(-1, keepdims=True)
    shares = np.where(sums > 0, weights / np.where(sums > 0, sums, 1), 1 / num_codes)
    slots = np.floor(shares * (TOTAL - num_codes)).astype(np.int64) + 1
    likeliest = slots.argmax(-1, keepdims=True)
    left = TOTAL - slots.sum(-1, keepdims=True)
    np.put_along_axis(slots, likeliest, np.take_along_axis(slots, likeliest, -1) + left, -1)
    ends = np.full((*weights.shape[:-1], width), TOTAL, np.int16)
    ends[..., :num_codes] = slots.cumsum(-1)
    return ends


def check_ends(ends: Ends) -> None:
    """ValueError unless these can be distributions: [..., width], never falling, from 1 slot to all."""
    sound = ends.dtype == np.int16 and ends.shape[-1] in WIDTHS and (ends[..., 0] >= 1).all()
    if not sound or (np.diff(ends, axis=-1) < 0).any() or (ends[..., -1] != TOTAL).any():
        raise ValueError(f"{ends.shape} {ends.dtype} is no table of distributions over {TOTAL} slots")


def cost_bits(counts: npt.NDArray[np.int64], ends: Ends) -> float:
    """Bits that codes so often seen, counts [..., codes], take under these distributions."""
    slots = np.diff(ends[..., : counts.shape[-1]], axis=-1, prepend=0)
    return float((counts * (BITS - np.log2(np.maximum(slots, 1)))).sum())


def encode(codes: Bytes, tables: Tables) -> bytes:
    """The stream of all codes, in the order `Tables` says. ValueError for a code without slots."""
    if not _is_native():
        return encode_reference(codes, tables)
    from kvwise import _native

    codes, ends = np.ascontiguousarray(codes), np.ascontiguousarray(tables.ends)
    _check_shapes(codes, tables)
    out = np.empty(4 * tables.lanes + 2 * codes.size, np.uint8)
    length = _native.rans_encode(
        _address(ends), ends.shape[-1], list(tables.rows), tables.columns, tables.lanes,
        _address(codes), _address(out), out.size,
    )  # fmt: skip
    return out[out.size - length :].tobytes()


def decode(stream: Buffer, tables: Tables) -> Bytes:
    """The codes [num_codes] of a stream. ValueError if `encode` cannot have written it with these tables."""
    if not _is_native():
        return decode_reference(stream, tables)
    from kvwise import _native

    data, ends = np.frombuffer(stream, np.uint8), np.ascontiguousarray(tables.ends)
    codes = np.empty(tables.num_codes, np.uint8)
    _check_shapes(codes, tables)
    sound = _native.rans_decode(
        _address(ends), ends.shape[-1], list(tables.rows), tables.columns, tables.lanes,
        _address(data), data.size, _address(codes),
    )  # fmt: skip
    if not sound:
        raise ValueError(f"{data.size} bytes are no stream of {codes.size} codes")
    return codes


def encode_reference(codes: Bytes, tables: Tables) -> bytes:
    """`encode` in numpy: one pass of the loop codes one code in each lane."""
    _check_shapes(codes, tables)
    place, chosen = _order(tables)
    wide, flat = tables.ends.astype(np.uint64), codes.reshape(-1)[place].astype(np.int64)
    if codes.size and flat.max() >= wide.shape[-1]:
        raise ValueError(f"code {flat.max()} has no slots")
    start = np.where(flat > 0, wide[chosen, np.maximum(flat, 1) - 1], 0).astype(np.uint64)
    slots = wide[chosen, flat] - start
    if not slots.all():
        raise ValueError(f"code {flat[slots == 0][0]} has no slots")
    lanes = tables.lanes
    states = np.full(lanes, _LOW, np.uint64)
    words = []
    for begin in reversed(range(0, codes.size, lanes)):
        now = slice(begin, begin + lanes)
        x, width = states[: slots[now].size], slots[now]
        full = x >= width << np.uint64(32 - BITS)
        words.append((x[full] & np.uint64(0xFFFF))[::-1])
        x = np.where(full, x >> np.uint64(16), x)
        states[: x.size] = (x // width << np.uint64(BITS)) + x % width + start[now]
    run = np.concatenate(words)[::-1] if words else np.zeros(0)
    return states.astype("<u4").tobytes() + run.astype("<u2").tobytes()


def decode_reference(stream: Buffer, tables: Tables) -> Bytes:
    """`decode` in numpy."""
    data, lanes, num_codes = memoryview(stream).cast("B"), tables.lanes, tables.num_codes
    if len(data) < 4 * lanes or len(data) % 2:
        raise ValueError(f"{len(data)} bytes are no stream of {num_codes} codes")
    states = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.uint64)
    words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.uint64)
    padded = np.concatenate([words, np.zeros(lanes, np.uint64)])
    place, chosen = _order(tables)
    wide, codes, taken = tables.ends.astype(np.uint64), np.empty(num_codes, np.uint8), 0
    for begin in range(0, num_codes, lanes):
        now = chosen[begin : begin + lanes]
        x = states[: now.size]
        slot = x & np.uint64(TOTAL - 1)
        code = (wide[now] <= slot[:, None]).sum(1)
        start = np.where(code > 0, wide[now, np.maximum(code, 1) - 1], 0).astype(np.uint64)
        x = (wide[now, code] - start) * (x >> np.uint64(BITS)) + slot - start
        short = x < _LOW
        after = taken + np.cumsum(short)
        if after[-1] > words.size:
            raise ValueError(f"{len(data)} bytes are no stream of {num_codes} codes")
        states[: x.size] = np.where(short, (x << np.uint64(16)) | padded[after - short], x)
        codes[place[begin : begin + lanes]] = code
        taken = int(after[-1])
    if taken != words.size or (states != _LOW).any():
        raise ValueError(f"{len(data)} bytes are no stream of {num_codes} codes")
    return codes


def _order(tables: Tables) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each code in coding order: where it lies, and which distribution it has."""
    places, chosen, base = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for part, rows in enumerate(tables.rows):
        size = rows * tables.columns
        places.append(base + np.arange(size).reshape(rows, tables.columns).T.reshape(-1))
        chosen.append(part * tables.columns + np.repeat(np.arange(tables.columns), rows))
        base += size
    return np.concatenate(places), np.concatenate(chosen)


def _check_shapes(codes: Bytes, tables: Tables) -> None:
    if codes.size != tables.num_codes or codes.dtype != np.uint8:
        raise ValueError(f"{codes.size} codes of {codes.dtype}, but the tables are for {tables.num_codes} bytes")
    if tables.ends.shape != (len(tables.rows) * tables.columns, width_for(tables.ends.shape[-1])):
        raise ValueError(f"{tables.ends.shape} ends for {len(tables.rows)} parts of {tables.columns} columns")
    if tables.ends.dtype != np.int16:
        raise ValueError(f"ends must be int16, got {tables.ends.dtype}")


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _is_native() -> bool:
    """Whether the native coder is there: kvwise may have been installed without a compiler."""
    try:
        from kvwise import _native
    except ImportError:
        return False
    return hasattr(_native, "rans_decode")
