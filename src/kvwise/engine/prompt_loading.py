"""A prompt cache on its way back: records that are verified, then put where requests find them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.misses import RemovalReason
from kvwise.cache.residency import Entry
from kvwise.cache.terms import Terms
from kvwise.core.errors import CapacityError
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.hierarchy import Hierarchy
from kvwise.engine.hierarchy.names import tag_text
from kvwise.engine.hierarchy.tier import Item
from kvwise.engine.lifecycle import Owner
from kvwise.engine.prompt_file import Manifest, damaged
from kvwise.engine.prompt_parts import (
    AT_ONCE,
    RAW,
    block_header,
    deadlines_of,
    device_of,
    prefix_keys,
    room_for,
    size_of_record,
)
from kvwise.policies.base import Blocks
from kvwise.tiers.base import Fault
from kvwise.tiers.blocks import RawRecord, restore_blocks, seal_blocks
from kvwise.tiers.record import Header, open_record


@dataclass(frozen=True, slots=True)
class LoadedPrompt:
    """What came of a file: of its blocks, those that are in `place` now (the device, or a tier), and those expired."""

    path: str
    num_blocks: int
    num_tokens: int
    num_resident: int
    num_expired: int
    place: str


class Reader:
    """Reads records of an open file by the number of their block."""

    def __init__(self, file: BinaryIO, path: Path, offset: int, manifest: Manifest, engine: Engine) -> None:
        self.manifest = manifest
        self.path = path
        self._file = file
        self._offset = offset
        self._engine = engine

    def verify(self) -> list[float]:
        """When each block expires, on the engine's clock. UsageError unless every byte of every record is sound."""
        links, layout = self.manifest.links, self._engine.memory.layout
        root, deadlines = self.manifest.identity.root(), deadlines_of(self._engine)
        if self.manifest.record_bytes != size_of_record(self._engine):
            raise damaged(self.path, f"records of {self.manifest.record_bytes} bytes")
        until = []
        for number, link in enumerate(links):
            found = open_record(self.read(number, 1)[0], link.key, root, RAW.levels[0])
            if isinstance(found, Fault):
                raise damaged(self.path, f"block {number}: {found}")
            header = found[0]
            said = (header.parent, header.depth, header.num_tokens, len(header.segments))
            if said != (link.parent, link.depth, layout.block_size, layout.num_layers):
                raise damaged(self.path, f"block {number} is not the one its manifest names")
            until.append(deadlines.entry(header).terms.expires_at)
        return until

    def read(self, first: int, count: int) -> list[memoryview]:
        """The records of `count` blocks from number `first` on."""
        size = self.manifest.record_bytes
        self._file.seek(self._offset + first * size)
        data = memoryview(self._file.read(count * size))
        if len(data) < count * size:
            raise damaged(self.path, "it ends early")
        return [data[i * size : (i + 1) * size] for i in range(count)]

    def restore(self, numbers: Sequence[int], keys: Tensor, values: Tensor, places: Sequence[int]) -> None:
        """Verify blocks once more, and put them into their places of keys, values [n, L, H, block_size, D]."""
        names = [self.manifest.links[i].key for i in numbers]
        views = [self.read(i, 1)[0] for i in numbers]
        faults = restore_blocks(views, names, self.manifest.identity.root(), RAW, 0, keys, values, places)
        for number, fault in zip(numbers, faults, strict=True):
            if fault is not None:
                raise damaged(self.path, f"block {number}: {fault}")


class Loading:
    """Puts the sound blocks of one file where requests find them."""

    def __init__(self, engine: Engine, reader: Reader, until: Sequence[float], owner: Owner) -> None:
        self._engine = engine
        self._reader = reader
        self._until = until
        self._owner = owner
        self._number = {link.key: i for i, link in enumerate(reader.manifest.links)}
        self._published: list[bytes] = []

    def run(self) -> LoadedPrompt:
        """Load what has not expired; all or nothing."""
        manifest, lifecycle = self._reader.manifest, self._engine.lifecycle
        chains = self._alive()
        alive = {key for keys in chains for key in keys.chain}
        name = f"prompt cache {self._reader.path}"
        terms = lifecycle.begin(name, self._owner, chains[0]) if chains else Terms()
        try:
            for keys in chains:
                if self._owner.session:
                    lifecycle.registry.use(self._owner.session, keys.chain, keys.root)
            place, count = self._place(chains, terms)
        finally:
            lifecycle.end(name)
        size = len(manifest.links)
        return LoadedPrompt(str(self._reader.path), size, manifest.num_tokens, count, size - len(alive), place)

    def _alive(self) -> list[PrefixKeys]:
        """The chains of the file, cut before their first expired block."""
        now = self._engine.clock.now()
        links = self._reader.manifest.links
        dead: set[bytes] = set()
        for link, until in zip(links, self._until, strict=True):
            if until <= now or link.parent in dead:
                dead.add(link.key)
        left = {link.key: link.parent for link in links if link.key not in dead}
        inner = set(left.values())
        chains = []
        for leaf in (key for key in left if key not in inner):
            chain, parent = [leaf], left[leaf]
            while parent in left:
                chain.append(parent)
                parent = left[parent]
            chains.append(prefix_keys(self._engine, parent, chain[::-1], self._reader.manifest.tokens))
        return chains

    def _place(self, chains: Sequence[PrefixKeys], terms: Terms) -> tuple[str, int]:
        keys = list(dict.fromkeys(key for one in chains for key in one.chain))
        if self._into_device(chains, terms):
            return "device", len(keys)
        hierarchy = self._engine.memory.hierarchy
        if hierarchy is None:
            raise CapacityError(
                f"{self._reader.path}: {len(keys)} blocks do not fit the device pool of "
                f"{self._engine.memory.cache.usage().num_blocks} blocks now, and there is no tier below: raise "
                "kv_cache_memory_bytes, or give a tier"
            )
        return hierarchy.tiers[0].name, self._into_tier(hierarchy, [self._number[key] for key in keys], terms)

    def _into_device(self, chains: Sequence[PrefixKeys], terms: Terms) -> bool:
        """Publish the chains on the device. False if they do not fit; on an error nothing stays published."""
        cache = self._engine.memory.cache
        held: list[Blocks] = []
        try:
            for keys in chains:
                row = self._admit(keys, terms)
                if row is None:
                    return False
                try:
                    held.append(self._fill(row, keys))
                finally:
                    cache.release(row)
        except BaseException:
            withdrawn = cache.withdraw(self._published, RemovalReason.WITHDRAWN)
            cache.let_go(withdrawn.blocks)
            raise
        finally:
            for blocks in held:
                cache.let_go(blocks)
        return True

    def _admit(self, keys: PrefixKeys, terms: Terms) -> int | None:
        """A row with room for the whole chain, holding what is there already; None if there is none."""
        cache = self._engine.memory.cache
        num_tokens = len(keys) * cache.block_size
        try:
            match = cache.match(keys, num_tokens + 1)
            row = cache.admit(match, keys, match.num_tokens, terms=terms)
        except CapacityError:
            return None
        try:
            if cache.reserve(row, num_tokens):
                return row
        except CapacityError:  # longer than a request may be
            pass
        cache.release(row)
        return None

    def _fill(self, row: int, keys: PrefixKeys) -> Blocks:
        """Bring the blocks that the row lacks, then publish them; they are held, so that no later chain evicts them."""
        cache, device = self._engine.memory.cache, device_of(self._engine)
        first, size = int(cache.num_computed[row]) // cache.block_size, cache.block_size
        blocks = cache.hold(row, 0, len(keys))
        try:
            numbers = [self._number[key] for key in keys.chain]
            for start in range(first, len(keys), AT_ONCE):
                stop = min(start + AT_ONCE, len(keys))
                ids = blocks[start:stop].tolist()
                keys_out, values_out, places = device.target(ids)
                self._reader.restore(numbers[start:stop], keys_out, values_out, places)
                device.write(ids, keys_out, values_out)
                self._place_columns(blocks[start:stop], start)
            cache.set_expiry(row, first, np.array([self._until[i] for i in numbers[first:]]))
            cache.commit(np.array([row]), np.array([len(keys) * size]))
        except BaseException:
            cache.let_go(blocks)
            raise
        self._published += keys.chain[first:]
        return blocks

    def _place_columns(self, blocks: Blocks, start: int) -> None:
        """Loaded tokens have their positions, and have received no attention of a request."""
        arena, size = self._engine.memory.arena, self._engine.memory.layout.block_size
        ids = torch.from_numpy(blocks).to(arena.keys.device)
        if "positions" in arena.columns:
            column = arena.by_block("positions")
            values = torch.arange(start * size, (start + len(blocks)) * size, dtype=column.dtype, device=column.device)
            column[ids] = values.view(len(blocks), 1, size)
        if "mass" in arena.columns:
            arena.by_block("mass")[ids] = 0.0

    def _into_tier(self, hierarchy: Hierarchy, numbers: Sequence[int], terms: Terms) -> int:
        """Write blocks to the first tier, first ones first, as its codec writes them; how many are there now."""
        links, count = self._reader.manifest.links, 0
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            keys, values = room_for(self._engine, len(part))
            self._reader.restore(part, keys, values, range(len(part)))
            kept = [True] * len(part)
            for level, codec in enumerate(hierarchy.codec.levels):
                each = [replace(terms, expires_at=min(terms.expires_at, self._until[i])) for i in part]
                headers = [
                    replace(
                        block_header(self._engine, links[i], one, self._owner, hierarchy.deadlines),
                        key=hierarchy.record_key(links[i].key, level),
                        codec=codec,
                    )
                    for i, one in zip(part, each, strict=True)
                ]
                sealed = seal_blocks(hierarchy.codec, level, headers, keys, values, range(len(part)))
                items = [_item(h, pieces, one) for h, pieces, one in zip(headers, sealed, each, strict=True)]
                written = hierarchy.tiers[0].write(items)
                kept = [a and b for a, b in zip(kept, written, strict=True)]
            count += sum(kept)
        return count


def _item(header: Header, pieces: object, terms: Terms) -> Item:
    assert isinstance(pieces, Sequence)
    num_bytes = pieces.num_bytes if isinstance(pieces, RawRecord) else sum(memoryview(p).nbytes for p in pieces)
    owners = replace(terms, tenant=tag_text(terms.tenant), session=tag_text(terms.session))
    return Item(Entry(header.key, num_bytes, header.depth, owners), pieces)
