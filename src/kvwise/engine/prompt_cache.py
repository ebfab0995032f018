"""Named prompt caches: the KV of a prompt or of a session to a portable file, and back into an engine."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.cache.misses import RemovalReason
from kvwise.cache.residency import Entry
from kvwise.cache.scopes import Scope, effective_salt
from kvwise.cache.terms import Terms
from kvwise.core.errors import CapacityError, UsageError
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.device import DeviceBlocks
from kvwise.engine.hierarchy.hierarchy import Hierarchy, StoredBlock
from kvwise.engine.hierarchy.names import Deadlines, tag, tag_text
from kvwise.engine.hierarchy.tier import Item
from kvwise.engine.lifecycle import Owner
from kvwise.engine.prompt_file import Link, Manifest, damaged, opened, read_manifest, replacing
from kvwise.policies.base import Blocks
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.blocks import RawRecord, restore_blocks, seal_blocks
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.record import Header, open_record, record_bytes

_RAW = cast(Codec, Raw())
_AT_ONCE = 32  # blocks
_DROPPED = (FaultKind.CORRUPT, FaultKind.FOREIGN, FaultKind.MISSING)  # the record is of no use to anybody
_NOBODY = Owner()


@dataclass(frozen=True, slots=True)
class SavedPrompt:
    """What a file holds now."""

    path: str
    num_blocks: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class LoadedPrompt:
    """What came of a file: of its blocks, those that are in `place` now (the device, or a tier), and those expired."""

    path: str
    num_blocks: int
    num_tokens: int
    num_resident: int
    num_expired: int
    place: str


class _Found(NamedTuple):
    """Where the KV of a block is now (a device block, or a tier below), and until when it may be found."""

    link: Link
    block: int | None
    stored: StoredBlock | None
    until: float


class _Lost(Exception):
    """A block turned out bad while it was saved: it is gone, look again."""


# -- saving -----------------------------------------------------------------------------------------------------


def save_prompt_cache(
    engine: Engine, path: str | Path, *, prompt: Sequence[int] | None = None, session: str = "", owner: Owner = _NOBODY
) -> SavedPrompt:
    """Write the KV of a prompt's full blocks, or of all chains that a session used, to a file of any name.

    What is saved is the leading run that is resident, on the device or below. `owner` says under whose salt the prompt
    is; a session's tenant is known. The file takes its place at once, or nothing changes. UsageError if nothing is
    resident, if the strategy reuses no prefixes, or if the file cannot be written.
    """
    _require_sharing(engine)
    if (prompt is None) == (not session):
        raise UsageError("a prompt cache is of a prompt or of a session: give one of them")
    target = Path(path)
    while True:
        try:
            if prompt is not None:
                return _save(engine, target, [engine.lifecycle.keys(prompt, owner)], owner, prompt)
            tenant = engine.lifecycle.registry.tenant_of(session)
            return _save(engine, target, _chains(engine, session), Owner(tenant, session), None)
        except _Lost:
            continue


def _save(
    engine: Engine, path: Path, chains: Sequence[PrefixKeys], owner: Owner, prompt: Sequence[int] | None
) -> SavedPrompt:
    found = _locate(engine, chains)
    if not found:
        raise UsageError(
            "nothing to save: no full block of it is resident; compute it first "
            f"(a block is {engine.memory.layout.block_size} tokens)"
        )
    manifest = Manifest(
        identity=engine.memory.cache.identity,
        links=tuple(one.link for one in found),
        tokens=None if prompt is None else tuple(int(t) for t in prompt),
        record_bytes=_record_bytes(engine),
        saved_at=time.time(),
    )
    with replacing(path) as file:
        file.write(manifest.pack())
        for record in _seal(engine, found, owner):
            for piece in record:
                file.write(piece)
        num_bytes = file.tell()
    return SavedPrompt(str(path), len(found), manifest.num_tokens, num_bytes)


def _chains(engine: Engine, session: str) -> list[PrefixKeys]:
    """All chains a session used, from their roots to their last blocks."""
    links = engine.lifecycle.registry.links(session)
    roots = _roots(engine, Owner(engine.lifecycle.registry.tenant_of(session), session))
    inner = set(links.values())
    chains = []
    for leaf in (key for key in links if key not in inner):
        chain, parent = [leaf], links[leaf]
        while parent in links:
            chain.append(parent)
            parent = links[parent]
        if parent in roots:  # else its start was purged
            chains.append(_prefix_keys(engine, parent, chain[::-1]))
    return chains


def _locate(engine: Engine, chains: Sequence[PrefixKeys]) -> list[_Found]:
    """Each resident block of the chains once, a parent before what continues it."""
    cache, hierarchy = engine.memory.cache, engine.memory.hierarchy
    found: dict[bytes, _Found] = {}
    for keys in chains:
        blocks = cache.match(keys, len(keys) * cache.block_size + 1).blocks.tolist()
        below = [] if hierarchy is None else hierarchy.find(keys.chain[len(blocks) :])
        until = cache.deadlines_of(keys.chain[: len(blocks)])
        if hierarchy is not None:
            until += [hierarchy.deadline(stored) for stored in below]
        where: list[tuple[int | None, StoredBlock | None]] = [(b, None) for b in blocks] + [(None, s) for s in below]
        for i, ((block, stored), at) in enumerate(zip(where, until, strict=True)):
            link = Link(keys.chain[i], keys.chain[i - 1] if i else keys.root, i)
            found.setdefault(link.key, _Found(link, block, stored, at))
    return list(found.values())


def _seal(engine: Engine, found: Sequence[_Found], owner: Owner) -> Iterator[RawRecord]:
    """The records of the blocks, in order; each must be written before the next is asked for."""
    deadlines = _deadlines(engine)
    for on_device, group in groupby(found, key=lambda one: one.block is not None):
        members = list(group)
        for start in range(0, len(members), _AT_ONCE):
            part = members[start : start + _AT_ONCE]
            headers = [_header(engine, one.link, Terms(one.until), owner, deadlines) for one in part]
            keys, values, places = _read_device(engine, part) if on_device else _read_below(engine, part)
            for record in seal_blocks(_RAW, 0, headers, keys, values, places):
                assert isinstance(record, RawRecord)
                yield record


def _header(engine: Engine, link: Link, terms: Terms, owner: Owner, deadlines: Deadlines) -> Header:
    stored_at, expires_at, idle_s = deadlines.header_times(terms)
    return Header(
        key=link.key,
        parent=link.parent,
        identity=engine.memory.cache.identity.root(),
        codec=_RAW.levels[0],
        num_tokens=engine.memory.layout.block_size,
        depth=link.depth,
        stored_at=stored_at,
        expires_at=expires_at,
        idle_s=idle_s,
        tenant=tag(owner.tenant),
        session=tag(owner.session),
    )


def _read_device(engine: Engine, part: Sequence[_Found]) -> tuple[Tensor, Tensor, Sequence[int]]:
    device = _device(engine)
    device.ready()
    return device.read([one.block for one in part if one.block is not None])


def _read_below(engine: Engine, part: Sequence[_Found]) -> tuple[Tensor, Tensor, Sequence[int]]:
    hierarchy = engine.memory.hierarchy
    assert hierarchy is not None
    keys, values = _room(engine, len(part))
    for place, one in enumerate(part):
        assert one.stored is not None
        level = one.stored.best
        index = one.stored.tiers[level]
        assert index is not None
        tier, name = hierarchy.tiers[index], hierarchy.record_key(one.link.key, level)
        views = tier.read([Extent(name)])
        (fault,) = restore_blocks(views, [name], hierarchy.root, hierarchy.codec, level, keys, values, [place])
        if fault is not None and fault.kind in _DROPPED:
            tier.drop(name, fault)
            raise _Lost
        if fault is not None:
            raise UsageError(f"tier {tier.name} cannot be read now ({fault}); nothing is saved")
    return keys, values, range(len(part))


# -- loading ----------------------------------------------------------------------------------------------------


def load_prompt_cache(engine: Engine, path: str | Path, *, owner: Owner = _NOBODY) -> LoadedPrompt:
    """Bring the KV of a file back: into the device pool, where the next request with that prompt finds it, or if it
    does not fit, into the first tier.

    All of the file is verified before anything is loaded. `owner` names the salt it was saved under: its keys are made
    of that, and under another it is refused. Blocks keep the rest of their time to live; expired ones stay out.
    UsageError, and nothing loaded, for another model, dtype, block size, format or salt, and for a file that is cut or
    damaged anywhere; CapacityError if there is no room for it.
    """
    _require_sharing(engine)
    source = Path(path)
    with opened(source) as file:
        manifest, offset = read_manifest(file, source)
        _require_identity(engine, manifest.identity, source)
        _require_owner(engine, manifest, owner, source)
        reader = _Reader(file, source, offset, manifest, engine)
        until = reader.verify()
        return _Loading(engine, reader, until, owner).run()


class _Reader:
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
        root, deadlines = self.manifest.identity.root(), _deadlines(self._engine)
        if self.manifest.record_bytes != _record_bytes(self._engine):
            raise damaged(self.path, f"records of {self.manifest.record_bytes} bytes")
        until = []
        for number, link in enumerate(links):
            found = open_record(self.read(number, 1)[0], link.key, root, _RAW.levels[0])
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
        faults = restore_blocks(views, names, self.manifest.identity.root(), _RAW, 0, keys, values, places)
        for number, fault in zip(numbers, faults, strict=True):
            if fault is not None:
                raise damaged(self.path, f"block {number}: {fault}")


class _Loading:
    """Puts the sound blocks of one file where requests find them."""

    def __init__(self, engine: Engine, reader: _Reader, until: Sequence[float], owner: Owner) -> None:
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
            chains.append(_prefix_keys(self._engine, parent, chain[::-1], self._reader.manifest.tokens))
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
        cache, device = self._engine.memory.cache, _device(self._engine)
        first, size = int(cache.num_computed[row]) // cache.block_size, cache.block_size
        blocks = cache.hold(row, 0, len(keys))
        try:
            numbers = [self._number[key] for key in keys.chain]
            for start in range(first, len(keys), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(keys))
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
        for start in range(0, len(numbers), _AT_ONCE):
            part = numbers[start : start + _AT_ONCE]
            keys, values = _room(self._engine, len(part))
            self._reader.restore(part, keys, values, range(len(part)))
            kept = [True] * len(part)
            for level, codec in enumerate(hierarchy.codec.levels):
                each = [replace(terms, expires_at=min(terms.expires_at, self._until[i])) for i in part]
                headers = [
                    replace(
                        _header(self._engine, links[i], one, self._owner, hierarchy.deadlines),
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


# -- whose it is ------------------------------------------------------------------------------------------------


def _require_sharing(engine: Engine) -> None:
    if not engine.memory.cache.sharing:
        raise UsageError(f"a prompt cache needs prefix reuse, which {engine.strategy} has not: add +prefix")


def _require_identity(engine: Engine, theirs: Identity, path: Path) -> None:
    ours = engine.memory.cache.identity
    for name, value in asdict(ours).items():
        if (other := getattr(theirs, name)) != value:
            raise UsageError(
                f"{path}: the prompt cache is of {name} {other!r}, this engine has {value!r}; use it with the model "
                "and settings it was saved with"
            )


def _require_owner(engine: Engine, manifest: Manifest, owner: Owner, path: Path) -> None:
    roots = _roots(engine, owner)
    if not manifest.roots <= roots.keys():
        raise UsageError(
            f"{path}: the prompt cache was saved under another salt or session than salt {owner.tenant!r}, session "
            f"{owner.session!r}: name those it was saved under"
        )
    if manifest.tokens is not None:
        (root,) = manifest.roots
        keys = engine.memory.cache.keys(np.array(manifest.tokens, np.int64), roots[root])
        if keys.chain[: len(manifest.links)] != [link.key for link in manifest.links]:
            raise damaged(path, "its keys are not those of its tokens")


def _roots(engine: Engine, owner: Owner) -> dict[bytes, str]:
    """Root -> salt, of all scopes that an owner can use."""
    scopes = [Scope.GLOBAL, Scope.TENANT, *([Scope.SESSION] if owner.session else [])]
    salts = [salt for scope in scopes if (salt := effective_salt(scope, owner.tenant, owner.session)) is not None]
    return {engine.memory.cache.keys(np.zeros(0, np.int64), salt).root: salt for salt in salts}


def _prefix_keys(engine: Engine, root: bytes, chain: list[bytes], tokens: Sequence[int] | None = None) -> PrefixKeys:
    cache = engine.memory.cache
    if tokens is not None:  # the probes of the first block tell later misses of other salts why
        whole = cache.keys(np.array(tokens, np.int64))
        return PrefixKeys(root, whole.unsalted_root, chain, whole.probe, whole.bare_probe)
    return PrefixKeys(root, cache.identity.root(), chain, chain[0])


def _deadlines(engine: Engine) -> Deadlines:
    hierarchy = engine.memory.hierarchy
    return Deadlines.start(engine.clock) if hierarchy is None else hierarchy.deadlines


def _device(engine: Engine) -> DeviceBlocks:
    hierarchy = engine.memory.hierarchy
    return DeviceBlocks(engine.memory.arena) if hierarchy is None else hierarchy.device


def _room(engine: Engine, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values [n, L, H, block_size, D] in CPU memory, for blocks on their way."""
    layout, arena = engine.memory.layout, engine.memory.arena
    shape = (num_blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return torch.empty(shape, dtype=arena.keys.dtype), torch.empty(shape, dtype=arena.values.dtype)


def _record_bytes(engine: Engine) -> int:
    layout = engine.memory.layout
    return record_bytes([layout.block_bytes // layout.num_layers] * layout.num_layers)
