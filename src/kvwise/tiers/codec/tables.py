"""Distributions as bytes, to lie beside a tier: safetensors behind a checksum, since that format has none itself."""

import json
from collections.abc import Mapping
from hashlib import sha256

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save
from xxhash import xxh3_128_digest

from kvwise.tiers.base import Buffer

Arrays = Mapping[str, npt.NDArray[np.int16]]

_MAGIC = b"KVWTAB\x00\x01"
_DIGEST_BYTES = 16
_START = len(_MAGIC) + _DIGEST_BYTES


def pack(codec: str, arrays: Arrays) -> bytes:
    """`codec` prints which codec and options the arrays belong to."""
    body = save(dict(arrays), {"codec": codec})
    return _MAGIC + xxh3_128_digest(body) + body


def unpack(data: Buffer) -> tuple[str, dict[str, npt.NDArray[np.int16]]]:
    """(codec, arrays) of `pack`. ValueError if the bytes are not as they were written."""
    raw = bytes(data)
    body = raw[_START:]
    if raw[: len(_MAGIC)] != _MAGIC or xxh3_128_digest(body) != raw[len(_MAGIC) : _START]:
        raise ValueError(f"{len(raw)} bytes are no tables of a codec, or not as they were written")
    try:
        length = int.from_bytes(body[:8], "little")
        codec = str(json.loads(body[8 : 8 + length])["__metadata__"]["codec"])
        return codec, load(body)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"no tables of a codec: {error}") from error


def digest(codec: str, arrays: Arrays) -> str:
    """Eight hexadecimal digits that stand for these tables in a level's spec."""
    state = sha256(codec.encode())
    for name, array in sorted(arrays.items()):
        state.update(f"|{name}{array.shape}{array.dtype.str}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:8]
