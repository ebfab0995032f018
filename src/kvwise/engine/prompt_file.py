"""The file of a named prompt cache: a manifest that says what is in it and whose it is, then records.

```
start      magic, format (uint32), bytes of the manifest (uint64)
manifest   JSON: identity, layout, chains of keys, tokens of the prompt
digest     xxh3-128 of start and manifest; padded to 64
records    one for each key in the manifest's order, as tiers/record.py frames them, all of the same size
```
"""

import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from xxhash import xxh3_128_digest

from kvwise.cache.identity import Identity
from kvwise.core.errors import UsageError
from kvwise.tiers.record import ALIGNMENT

MAGIC = b"KVPROMPT"
FORMAT = 1
_START = struct.Struct("<8sIQ")
_DIGEST_BYTES = 16
_KEY_BYTES = 32


class Link(NamedTuple):
    """One block of the file: its key, the key before it (the root, for the first of a chain), its index in it."""

    key: bytes
    parent: bytes
    depth: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file says of itself; `tokens` are those of the prompt it was saved for, None for a session.

    `links` name each key once, a parent before what continues it. `record_bytes` is the size of every record.
    """

    identity: Identity
    links: tuple[Link, ...]
    tokens: tuple[int, ...] | None
    record_bytes: int
    saved_at: float  # Unix seconds

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is in the file."""
        return len(self.links) * self.identity.block_size

    @property
    def roots(self) -> set[bytes]:
        """Parents of the first blocks: what identity and salt come to."""
        return {link.parent for link in self.links if not link.depth}

    def pack(self) -> bytes:
        """Start, manifest, digest and padding."""
        body = {
            "identity": asdict(self.identity),
            "dtype": self.identity.dtype,
            "layout": "records of one block, segments of one layer: keys [H, block_size, D], then values",
            "codec": "raw",
            "block_size": self.identity.block_size,
            "num_tokens": self.num_tokens,
            "record_bytes": self.record_bytes,
            "saved_at": self.saved_at,
            "tokens": self.tokens,
            "chains": _runs(self.links),
        }
        text = json.dumps(body).encode()
        data = _START.pack(MAGIC, FORMAT, len(text)) + text
        data += xxh3_128_digest(data)
        return data.ljust(-(-len(data) // ALIGNMENT) * ALIGNMENT, b"\x00")


def read_manifest(file: BinaryIO, path: Path) -> tuple[Manifest, int]:
    """The manifest, and the offset of the first record. UsageError for a file that is cut, damaged or none of ours."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise UsageError(f"{path}: {size} bytes that are no prompt cache; name a file that kvwise saved")
    _, version, length = _START.unpack(start)
    if version != FORMAT:
        raise UsageError(f"{path}: prompt cache of format {version}, this version reads {FORMAT}; save it again")
    if length > size - _START.size - _DIGEST_BYTES:
        raise damaged(path, f"{size} bytes, cut within the manifest")
    text = file.read(length)
    offset = -(-(_START.size + length + _DIGEST_BYTES) // ALIGNMENT) * ALIGNMENT
    tail = file.read(offset - _START.size - length)
    if tail != xxh3_128_digest(start + text).ljust(offset - _START.size - length, b"\x00"):
        raise damaged(path, "the checksum of its manifest is wrong")
    try:
        manifest = _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path, "its manifest has no meaning") from None
    expected = offset + len(manifest.links) * manifest.record_bytes
    if size != expected:
        raise damaged(path, f"{size} bytes instead of {expected}")
    return manifest, offset


def damaged(path: Path, why: str) -> UsageError:
    """The error for a file whose content cannot be believed."""
    return UsageError(f"{path}: the prompt cache is damaged ({why}); nothing of it is loaded, save it again")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, if it is a plain one. UsageError if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {_why(error)}; name a prompt cache that can be read") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path}: no plain file; name a prompt cache that kvwise saved")
    with open(fd, "rb") as file:
        yield file


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place, synced, when the block ends well; else it is removed.

    UsageError if it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: no plain file; name another for the prompt cache")
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {_why(error)}; name a file in a folder that can be written") from None
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.replace(name, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path}: {_why(error)}; the prompt cache is not saved") from None
    finally:
        with suppress(OSError):
            os.unlink(name)  # there only if it did not take its place


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _why(error: OSError | ValueError) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _runs(links: Sequence[Link]) -> list[dict[str, object]]:
    """Chains of keys: each run starts at a root or behind a key named before."""
    runs: list[dict[str, Any]] = []
    last = None
    for link in links:
        if last is None or link.parent != last:
            runs.append({"parent": link.parent.hex(), "keys": []})
        runs[-1]["keys"].append(link.key.hex())
        last = link.key
    return runs


def _parse(body: dict[str, Any]) -> Manifest:
    """ValueError, KeyError or TypeError for what no kvwise wrote."""
    given = body["identity"]
    known = {field.name: field.type for field in fields(Identity)}
    if set(given) != set(known) or any(not isinstance(given[name], kind) for name, kind in known.items()):  # type: ignore[arg-type]
        raise ValueError("identity")
    links = tuple(_links(body["chains"]))
    tokens = body["tokens"]
    if tokens is not None and not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise ValueError("tokens")
    record_bytes = body["record_bytes"]
    if type(record_bytes) is not int or record_bytes < 1 or not links:
        raise ValueError("record_bytes")
    return Manifest(
        Identity(**given), links, None if tokens is None else tuple(tokens), record_bytes, float(body["saved_at"])
    )


def _links(runs: list[dict[str, Any]]) -> Iterator[Link]:
    depth_of: dict[bytes, int] = {}
    for run in runs:
        parent = bytes.fromhex(run["parent"])
        for text in run["keys"]:
            key = bytes.fromhex(text)
            if len(key) != _KEY_BYTES or len(parent) != _KEY_BYTES or key in depth_of:
                raise ValueError("keys")
            depth_of[key] = depth_of.get(parent, -1) + 1
            yield Link(key, parent, depth_of[key])
            parent = key
