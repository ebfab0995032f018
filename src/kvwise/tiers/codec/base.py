"""The seam of codecs: one layer of one block to bytes and back."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvwise.tiers.base import Buffer


class Codec(Protocol):
    """Writes the keys and values of a block layer by layer, and reads them back.

    `levels` are the printed specs of the qualities it can write, best first, such as `("raw",)`, `("int4(group=32)",)`
    or `("cachegen(level=0)", "cachegen(level=1)", ...)`. A spec (at most 64 ASCII characters) names everything the
    bytes depend on besides the numbers themselves: it stands in every record and, unless the codec is `lossless`, in
    the identity that keys are made of. `lossless`: what is read back equals what was written, bit for bit.

    Tensors lie in CPU memory, are contiguous in their last three dimensions and have dtype float32, float16 or
    bfloat16. Thread-safe; a codec has no state but its options and tables.
    """

    name: str
    lossless: bool
    levels: tuple[str, ...]

    def encode(self, keys: Tensor, values: Tensor, level: int = 0) -> list[Sequence[Buffer]]:
        """One segment (in pieces) for each layer of a block: keys, values [L, H, block_size, D].

        Pieces may be views of the tensors: whoever asks keeps them unchanged until the record is written.
        """
        ...

    def decode(self, segment: Buffer, layer: int, keys: Tensor, values: Tensor, level: int = 0) -> None:
        """Write one layer into keys, values [H, block_size, D]. ValueError if the segment cannot be of this codec.

        The bytes have passed their checksum, but may be hostile: no read outside the segment, bounded memory.
        """
        ...
