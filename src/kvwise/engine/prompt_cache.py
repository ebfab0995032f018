"""Named prompt caches: the KV of a prompt or of a session to a portable file, and back into an engine."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvwise.cache.identity import Identity, PrefixKeys
from kvwise.cache.scopes import Scope, effective_salt
from kvwise.cache.terms import Terms
from kvwise.core.errors import UsageError
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.hierarchy import StoredBlock
from kvwise.engine.lifecycle import Owner
from kvwise.engine.prompt_file import Link, Manifest, damaged, opened, read_manifest, replacing
from kvwise.engine.prompt_loading import LoadedPrompt, Loading, Reader
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
from kvwise.tiers.base import Extent, FaultKind
from kvwise.tiers.blocks import RawRecord, restore_blocks, seal_blocks

__all__ = ["LoadedPrompt", "SavedPrompt", "load_prompt_cache", "save_prompt_cache"]

_DROPPED = (FaultKind.CORRUPT, FaultKind.FOREIGN, FaultKind.MISSING)  # the record is of no use to anybody
_NOBODY = Owner()


@dataclass(frozen=True, slots=True)
class SavedPrompt:
    """What a file holds now."""

    path: str
    num_blocks: int
    num_tokens: int
    num_bytes: int


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
        record_bytes=size_of_record(engine),
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
            chains.append(prefix_keys(engine, parent, chain[::-1]))
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
    deadlines = deadlines_of(engine)
    for on_device, group in groupby(found, key=lambda one: one.block is not None):
        members = list(group)
        for start in range(0, len(members), AT_ONCE):
            part = members[start : start + AT_ONCE]
            headers = [block_header(engine, one.link, Terms(one.until), owner, deadlines) for one in part]
            keys, values, places = _read_device(engine, part) if on_device else _read_below(engine, part)
            for record in seal_blocks(RAW, 0, headers, keys, values, places):
                assert isinstance(record, RawRecord)
                yield record


def _read_device(engine: Engine, part: Sequence[_Found]) -> tuple[Tensor, Tensor, Sequence[int]]:
    device = device_of(engine)
    device.ready()
    return device.read([one.block for one in part if one.block is not None])


def _read_below(engine: Engine, part: Sequence[_Found]) -> tuple[Tensor, Tensor, Sequence[int]]:
    hierarchy = engine.memory.hierarchy
    assert hierarchy is not None
    keys, values = room_for(engine, len(part))
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
        reader = Reader(file, source, offset, manifest, engine)
        until = reader.verify()
        return Loading(engine, reader, until, owner).run()


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
    # A prompt is of one salt, the owner's; a session may have stored under all that its requests could use.
    roots = _roots(engine, owner, [owner.scope] if manifest.tokens is not None else list(Scope))
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


def _roots(engine: Engine, owner: Owner, scopes: Sequence[Scope] = tuple(Scope)) -> dict[bytes, str]:
    """Root -> salt, of those of `scopes` that an owner can use."""
    usable = [scope for scope in scopes if owner.session or scope is not Scope.SESSION]
    salts = [salt for scope in usable if (salt := effective_salt(scope, owner.tenant, owner.session)) is not None]
    return {engine.memory.cache.keys(np.zeros(0, np.int64), salt).root: salt for salt in salts}
