"""How a block goes from an arena to a record and back: a codec's segments, sealed and checked.

Raw blocks are copied and checked in one pass (`fused.py`), many at once. Nothing here believes the memory that a record
lies in: what is checked is a private copy, or what has arrived in the arena. So that memory may be reused meanwhile.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from torch import Tensor

from kvwise.tiers.base import Buffer, Extent, Fault, FaultKind
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.fused import Shape, Wanted, copier
from kvwise.tiers.record import Header, cut, read_header, refuse, seal
from kvwise.tiers.scratch import Scratch

_scratch = Scratch()


class _Arena(NamedTuple):
    """Blocks of keys, values [N, L, H, block_size, D], and how the bytes of one lie in it."""

    shape: Shape
    keys: Tensor
    values: Tensor


class RawRecord(Sequence[Buffer]):
    """The record of a raw block that still lies in its arena only: its pieces, or `write_raw` puts it into its place.

    The block must not change until it is written: the digests are made when they are first needed.
    """

    __slots__ = ("_arena", "_block", "_pieces", "addresses", "header", "num_bytes")

    def __init__(self, header: Header, num_bytes: int, addresses: tuple[int, int], arena: _Arena, block: int) -> None:
        self.header = header
        self.num_bytes = num_bytes  # of the whole record; needs no digests
        self.addresses = addresses  # of layer 0's keys and values
        self._arena = arena
        self._block = block
        self._pieces: list[Buffer] | None = None

    @property
    def shape(self) -> Shape:
        """How its bytes lie in its arena."""
        return self._arena.shape

    @property
    def pieces(self) -> list[Buffer]:
        """Header, views of the tensors, paddings."""
        if self._pieces is None:
            keys, values = self._arena.keys[self._block], self._arena.values[self._block]
            self._pieces = seal(self.header, Raw().encode(keys, values))
        return self._pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self.pieces)

    @overload
    def __getitem__(self, index: int) -> Buffer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Buffer]: ...
    def __getitem__(self, index: int | slice) -> Buffer | Sequence[Buffer]:
        return self.pieces[index]


def num_bytes_of(pieces: Sequence[Buffer]) -> int:
    """Bytes of a whole record, without digesting a raw one for it."""
    return pieces.num_bytes if isinstance(pieces, RawRecord) else sum(memoryview(piece).nbytes for piece in pieces)


def seal_block(codec: Codec, level: int, header: Header, keys: Tensor, values: Tensor) -> Sequence[Buffer]:
    """The pieces of the record of one block: keys, values [L, H, block_size, D]. See `seal_blocks`."""
    return seal_blocks(codec, level, [header], keys[None], values[None], [0])[0]


def seal_blocks(
    codec: Codec, level: int, headers: Sequence[Header], keys: Tensor, values: Tensor, blocks: Sequence[int]
) -> list[Sequence[Buffer]]:
    """The pieces of the record of each of `blocks`, numbers in an arena keys, values [N, L, H, block_size, D].

    Headers are without segments, `codec` in them is that of the level. A raw record copies nothing and is not even
    digested until somebody looks at it: its block must stay as it is until the record is written.
    """
    if {header.codec for header in headers} - {codec.levels[level]}:
        raise ValueError(f"a header names another codec than {codec.levels[level]!r}")
    if isinstance(codec, Raw):  # its segments are the tensors' own bytes: nothing to encode
        arena = _Arena(_shape(keys, values), keys, values)
        num_bytes = arena.shape.record_bytes
        return [
            RawRecord(header, num_bytes, where, arena, block)
            for header, where, block in zip(headers, _addresses(keys, values, blocks), blocks, strict=True)
        ]
    return [
        seal(header, codec.encode(keys[block], values[block], level))
        for header, block in zip(headers, blocks, strict=True)
    ]


def write_raw(records: Sequence[RawRecord], targets: Sequence[memoryview], num_threads: int = 1) -> None:
    """Write each record into its target of `num_bytes` bytes, copied and digested in one pass over `num_threads`."""
    for shape in dict.fromkeys([record.shape for record in records]):
        chosen = [index for index, record in enumerate(records) if record.shape == shape]
        keys, values = zip(*[records[index].addresses for index in chosen], strict=True)
        headers, places = [records[index].header for index in chosen], [targets[index] for index in chosen]
        copier(None, num_threads).seal(shape, headers, list(keys), list(values), places)


def restore_block(
    view: Buffer, key: bytes, identity: bytes, codec: Codec, level: int, keys_out: Tensor, values_out: Tensor
) -> Header | Fault:
    """Verify a record and write its block into keys_out, values_out [L, H, block_size, D].

    On a fault the outputs may hold rubbish. The last three dimensions of the outputs are contiguous.
    """
    header = read_header(view)
    if isinstance(header, Fault):
        return header
    if fault := refuse(header, key, identity, codec.levels[level]):
        return fault
    if isinstance(codec, Raw):
        data, wanted = memoryview(view).cast("B"), Wanted([key], identity, header.codec)
        places = [keys_out.data_ptr()], [values_out.data_ptr()]
        if copier().open(_shape(keys_out, values_out), wanted, [data], *places)[0]:
            return header
    segments = cut(view, header)
    if isinstance(segments, Fault):
        return segments
    if len(segments) != len(keys_out):
        return Fault(FaultKind.CORRUPT, f"{len(segments)} segments for {len(keys_out)} layers")
    for layer, segment in enumerate(segments):
        if fault := restore_layer(segment, header, layer, codec, level, keys_out[layer], values_out[layer]):
            return fault
    return header


def restore_blocks(
    views: Sequence[memoryview | Fault],
    wanted: Sequence[bytes],
    identity: bytes,
    codec: Codec,
    level: int,
    keys_out: Tensor,
    values_out: Tensor,
    blocks: Sequence[int],
    num_threads: int = 1,
) -> list[Fault | None]:
    """Verify what a store has read, and write it into `blocks` of an arena [N, L, H, block_size, D].

    `wanted` are the keys asked for. Faults of the store are handed on; a block with a fault may hold rubbish.
    """
    found: list[Fault | None] = [view if isinstance(view, Fault) else None for view in views]
    left = [index for index, view in enumerate(views) if not isinstance(view, Fault)]
    if isinstance(codec, Raw) and left:
        records = [view for view in views if not isinstance(view, Fault)]
        asked = Wanted([wanted[index] for index in left], identity, codec.levels[level])
        sound = _open(records, asked, keys_out, values_out, [blocks[index] for index in left], num_threads)
        left = [index for index, good in zip(left, sound, strict=True) if not good]
    for index in left:  # raw ones again, slowly, to tell what is wrong with them
        view, block = views[index], blocks[index]
        if not isinstance(view, Fault):
            out = keys_out[block], values_out[block]
            restored = restore_block(view, wanted[index], identity, codec, level, *out)
            found[index] = restored if isinstance(restored, Fault) else None
    return found


def _open(
    records: list[memoryview], wanted: Wanted, keys: Tensor, values: Tensor, blocks: list[int], num_threads: int = 1
) -> list[bool]:
    """Whether each record was a sound raw one, the one wanted, and is now in its block of the arena."""
    key_places, value_places = zip(*_addresses(keys, values, blocks), strict=True)
    shape = _shape(keys, values)
    return copier(None, num_threads).open(shape, wanted, records, list(key_places), list(value_places))


def layer_extent(header: Header, layer: int) -> Extent:
    """What to read of a record to get one layer of it, for `restore_layer`."""
    return Extent(header.key, *header.segment_range(layer))


def restore_layer(
    segment: Buffer, header: Header, layer: int, codec: Codec, level: int, keys_out: Tensor, values_out: Tensor
) -> Fault | None:
    """Verify one layer's segment and write it into keys_out, values_out [H, block_size, D], which are contiguous.

    `header` has been verified and is of the codec and level. On a fault the outputs may hold rubbish.
    """
    data = memoryview(segment).cast("B")
    length, digest = header.segments[layer]
    if len(data) != length:
        return Fault(FaultKind.CORRUPT, f"segment {layer} has {len(data)} of {length} bytes")
    if isinstance(codec, Raw):
        if length != keys_out.nbytes + values_out.nbytes:
            return Fault(FaultKind.CORRUPT, f"segment {layer} of {length} bytes is not of this shape")
        return _copy(data, digest, layer, [_place(keys_out), _place(values_out)])
    _scratch.begin()
    private = _scratch.place(length)
    if fault := _copy(data, digest, layer, [(_address(private), length)]):
        return fault
    try:
        codec.decode(private, layer, keys_out, values_out, level)
    except ValueError as error:
        return Fault(FaultKind.CORRUPT, f"segment {layer}: {error}")
    return None


def _copy(data: memoryview, digest: bytes, layer: int, places: Sequence[tuple[int, int]]) -> Fault | None:
    """Copy `data` to (address, bytes) one after another; a fault unless what was copied has the digest."""
    position, pieces = _address(data), []
    for target, num_bytes in places:
        pieces.append((position, target, num_bytes))
        position += num_bytes
    if copier().copy(pieces) != digest:
        return Fault(FaultKind.CORRUPT, f"segment {layer}: the checksum is wrong")
    return None


def _shape(keys: Tensor, values: Tensor) -> Shape:
    """Of the blocks of an arena [N, L, H, block_size, D], or of one [L, H, block_size, D]."""
    if keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ before their last dimension"
        )
    return Shape(
        keys.shape[-4],
        *(_layer_bytes(tensor) for tensor in (keys, values)),
        *(tensor.stride(-4) * tensor.itemsize for tensor in (keys, values)),
    )


def _layer_bytes(tensor: Tensor) -> int:
    num_heads, block_size, dim = tensor.shape[-3:]
    if tensor.stride()[-3:] != (block_size * dim, dim, 1) or not tensor.is_cpu:
        _place(tensor[0, 0] if tensor.ndim == 5 else tensor[0])
    return num_heads * block_size * dim * tensor.itemsize


def _addresses(keys: Tensor, values: Tensor, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Where layer 0 of the keys and of the values of each block lies."""
    if blocks and not 0 <= min(blocks) <= max(blocks) < min(len(keys), len(values)):
        raise ValueError(f"blocks {min(blocks)} to {max(blocks)} of an arena of {len(keys)}")
    key_start, value_start = keys.data_ptr(), values.data_ptr()
    key_stride, value_stride = keys.stride(0) * keys.itemsize, values.stride(0) * values.itemsize
    return [(key_start + block * key_stride, value_start + block * value_stride) for block in blocks]


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor that lies in one run of CPU memory."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a layer must lie in one run of CPU memory, not as {tuple(tensor.shape)} {tensor.stride()}")
    return tensor.data_ptr(), tensor.nbytes


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).ctypes.data) if len(data) else 0
