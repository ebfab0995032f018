"""Beginnings of records: how much of one to ask for, and how much of one is needed to know when it expires."""

import struct
from collections.abc import Sequence

from kvwise.tiers.base import Buffer, Fault
from kvwise.tiers.record import MAGIC, header_bytes, read_header

HEAD_BYTES = header_bytes(128)  # holds most headers; for the others one asks once more
MAX_HEAD_BYTES = header_bytes(1024)
_SIZE = struct.Struct("<I")  # of the header, right after the magic


def is_cut(head: Buffer) -> bool:
    """Whether a header says that it goes on behind these `HEAD_BYTES`."""
    view = memoryview(head)
    if len(view) != HEAD_BYTES or view[: len(MAGIC)] != MAGIC:
        return False
    (size,) = _SIZE.unpack_from(view, len(MAGIC))
    return bool(size > HEAD_BYTES)


def front(pieces: Sequence[Buffer]) -> Buffer:
    """The beginning of a record in pieces, at least its header: the first piece if that is one by itself."""
    if pieces and not isinstance(read_header(pieces[0]), Fault):
        return pieces[0]
    head = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        if view.nbytes:
            head += view.cast("B")[:MAX_HEAD_BYTES]
        if len(head) >= MAX_HEAD_BYTES:
            break
    return head
