"""How long KV is kept, for whom, and how it is forgotten: sessions, TTL, pins, warm-up, purge - over all tiers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.manager import CacheManager
from kvwise.cache.misses import RemovalReason
from kvwise.cache.scopes import Scope, effective_salt
from kvwise.cache.sessions import SessionInfo, Sessions
from kvwise.cache.terms import Terms
from kvwise.cache.ttl import NO_TTL, Ttl, resolve
from kvwise.core.clock import Clock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import InvariantError, UsageError
from kvwise.engine.hierarchy.hierarchy import Hierarchy, Purged
from kvwise.engine.placement.choose import Memory

Prompt = Sequence[int] | PrefixKeys  # keys (of `Engine.keys`) for a prompt with images, whose tokens say too little


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What a purge did. A look-up afterwards found none of the purged blocks in any tier: that was tried.

    `tiers` begins with the device; `num_shared` blocks stay because another live owner holds them, `num_in_use` blocks
    of running requests cannot be found any more and go when those end.
    """

    tiers: tuple[Purged, ...]
    num_shared: int = 0
    num_in_use: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks removed, counted once for each tier they were in."""
        return sum(tier.num_blocks for tier in self.tiers)

    @property
    def num_bytes(self) -> int:
        """Bytes removed."""
        return sum(tier.num_bytes for tier in self.tiers)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose request it is: tenant, session ("": none), who may reuse its KV, and its times to live.

    `cache_salt` parts the requests of one scope further: only those with the same share.
    """

    tenant: str = ""
    session: str = ""
    scope: Scope = Scope.TENANT
    ttl: Ttl = NO_TTL
    cache_salt: str = ""

    @property
    def salt(self) -> str | None:
        """The salt of its keys; None: nothing of it is shared."""
        return effective_salt(self.scope, self.tenant, self.session, self.cache_salt)


@dataclass(slots=True)
class _Warm:
    """A prefix that is kept warm."""

    keys: PrefixKeys
    pin_until: float | None = None
    pinned: bool = False


@dataclass(slots=True)
class Residence:
    """Where the blocks of a prompt are: the leading run on the device, then those found below, by tier."""

    num_blocks: int
    on_device: int
    below: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_resident(self) -> int:
        """Blocks of the leading run that are somewhere."""
        return self.on_device + sum(self.below.values())


class Lifecycle:
    """The owner's side of one engine's KV. Runs on the engine's thread."""

    def __init__(self, memory: Memory, config: EngineConfig, clock: Clock) -> None:
        self.registry = Sessions(clock)
        self._memory = memory
        self._clock = clock
        self._default = Ttl(config.ttl_s, config.idle_ttl_s)
        self._unstated = Ttl(idle_s=config.session_idle_s)  # of sessions that requests open
        self._tenant_ttls: dict[str, Ttl] = {}
        self._session_ttls: dict[str, Ttl] = {}
        self._warm: dict[str, _Warm] = {}

    @property
    def _cache(self) -> CacheManager:
        return self._memory.cache

    @property
    def _hierarchy(self) -> Hierarchy | None:
        return self._memory.hierarchy

    # -- requests -----------------------------------------------------------------------------------------------

    def begin(self, request_id: str, owner: Owner, keys: PrefixKeys) -> Terms:
        """A request was queued: it holds its prompt's blocks from now on. The terms of what it stores.

        A session that nobody has opened is opened by its first request, and closed when it has been idle for long.
        """
        if owner.session:
            if not self.registry.is_open(owner.session):
                stated = self._session_ttls.get(owner.session, self._unstated)
                self.registry.open(owner.session, owner.tenant, stated)
            elif self.registry.tenant_of(owner.session) != owner.tenant:
                raise UsageError(f"session {owner.session!r} belongs to another tenant: choose another name")
            self.registry.use(owner.session, keys.chain, keys.root)
        self.registry.running(request_id, keys.chain, owner.session)
        ttl = resolve(
            owner.ttl, self._session_ttls.get(owner.session), self._tenant_ttls.get(owner.tenant), self._default
        )
        return ttl.terms(self._clock.now(), tenant=owner.tenant, session=owner.session)

    def grew(self, session: str, keys: PrefixKeys, start: int) -> None:
        """A request of a session has published more blocks: those from index `start` of its chain on."""
        self.registry.use(session, keys.chain[start:], keys.chain[start - 1] if start else keys.root)

    def end(self, request_id: str) -> None:
        """The request is over; what it was to keep warm is pinned now."""
        self.registry.ended(request_id)
        self._pin_warm(request_id)

    # -- sessions and tenants -----------------------------------------------------------------------------------

    def open_session(self, session: str, *, tenant: str = "", ttl: Ttl = NO_TTL) -> None:
        """Open a session, or open it again; `ttl` is the default of its requests, and closes it when it is over."""
        self.registry.open(session, tenant, ttl)
        self._session_ttls[session] = ttl

    def set_tenant_ttl(self, tenant: str, ttl: Ttl) -> None:
        """The default, and the most, that requests of a tenant may be kept."""
        self._tenant_ttls[tenant] = ttl

    def sessions(self) -> list[SessionInfo]:
        """All sessions that are remembered."""
        return self.registry.sessions()

    def close_session(self, session: str) -> None:
        """Drop the session's claims; blocks that others may use stay, and leave in their turn."""
        self.registry.close(session)
        self._session_ttls.pop(session, None)

    def purge_session(self, session: str) -> PurgeReport:
        """Forget now, in every tier, what only this session holds. Its running requests must have ended."""
        keys, shared = self.registry.purge_list(session)
        report = self._purge(keys, len(shared))
        self.registry.close(session)
        self._session_ttls.pop(session, None)
        return report

    # -- forgetting ---------------------------------------------------------------------------------------------

    def purge_prefix(self, prompt: Prompt, owner: Owner = Owner()) -> PurgeReport:
        """Forget now the blocks of a prompt under an owner's salt, whoever uses them."""
        return self._purge(self.keys(prompt, owner).chain, 0)

    def purge_tenant(self, tenant: str) -> PurgeReport:
        """Forget now everything that requests of a tenant have stored, in every tier."""
        keys = [key for key, terms in self._cache.stored() if terms.tenant == tenant]
        return self._purge(keys, 0, tenant=tenant)

    def purge_all(self) -> PurgeReport:
        """Forget everything, in every tier."""
        return self._purge([key for key, _ in self._cache.stored()], 0, everything=True)

    def _purge(
        self, keys: Sequence[bytes], num_shared: int, *, tenant: str | None = None, everything: bool = False
    ) -> PurgeReport:
        below: list[Purged] = []
        if (loads := self._memory.loads) is not None:
            below = loads.hierarchy.purge(keys, tenant=tenant, everything=everything)  # waits for blocks that it holds
            loads.stop_purged()
        withdrawn = self._cache.withdraw(keys, RemovalReason.PURGED)
        self._overwrite(withdrawn.blocks)
        self._cache.let_go(withdrawn.blocks)
        num_bytes = len(withdrawn.blocks) * self._memory.layout.block_bytes
        tiers = [Purged("device", len(withdrawn.blocks), num_bytes, overwritten=True), *below]
        self.registry.forget(keys)
        self._prove_gone(keys)
        return PurgeReport(tuple(tiers), num_shared, withdrawn.kept)

    def _overwrite(self, blocks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        layout, arena = self._memory.layout, self._memory.arena
        shape = (arena.num_blocks, layout.pages_per_block * layout.block_size, -1)
        index = torch.from_numpy(blocks).to(arena.keys.device)
        for tensor in (arena.keys, arena.values, *arena.columns.values()):
            tensor.view(shape)[index] = 0

    def _prove_gone(self, keys: Sequence[bytes]) -> None:
        hierarchy = self._hierarchy
        for key in keys:
            here = self._cache.is_stored(key)
            if here or (hierarchy is not None and hierarchy.find([key])):
                raise InvariantError(f"block {key.hex()[:16]} is found after it was purged")

    # -- keeping ------------------------------------------------------------------------------------------------

    def keys(self, prompt: Prompt, owner: Owner = Owner()) -> PrefixKeys:
        """The chain of a prompt under an owner's salt."""
        if isinstance(prompt, PrefixKeys):
            return prompt
        return self._cache.keys(np.asarray(prompt, dtype=np.int64), owner.salt)

    def pin(self, prompt: Prompt, owner: Owner = Owner(), *, until: float | None = None) -> int:
        """Keep what is stored of a prompt from eviction, in every tier, until `until` seconds on the clock.

        The number of blocks pinned on the device. Expiry and purge end a pin.
        """
        keys = self.keys(prompt, owner)
        count = self._cache.pin(keys, until)
        if self._hierarchy is not None:
            self._hierarchy.pin(keys.chain, until)
        self.registry.pin(keys.chain, until)
        return count

    def unpin(self, prompt: Prompt, owner: Owner = Owner()) -> int:
        """End the pins of a prompt's blocks; the number ended on the device."""
        keys = self.keys(prompt, owner)
        if self._hierarchy is not None:
            self._hierarchy.unpin(keys.chain)
        self.registry.unpin(keys.chain)
        return self._cache.unpin(keys)

    def residence(self, keys: PrefixKeys) -> Residence:
        """Where the blocks of a chain are now."""
        here = self._cache.num_resident(keys)
        below: dict[str, int] = {}
        if self._hierarchy is not None:
            for block in self._hierarchy.find(keys.chain[here:]):
                tier = block.tiers[block.best]
                assert tier is not None
                name = self._hierarchy.tiers[tier].name
                below[name] = below.get(name, 0) + 1
        return Residence(len(keys), here, below)

    # -- warm-up ------------------------------------------------------------------------------------------------

    def keep_warm(self, request_id: str, keys: PrefixKeys, *, pin: bool, until: float | None) -> None:
        """A warm-up request was queued: `ready` waits for its blocks; they are pinned when it has ended."""
        self._warm[request_id] = _Warm(keys, until, pinned=not pin)

    def _pin_warm(self, request_id: str) -> None:
        warm = self._warm.get(request_id)
        if warm is not None and not warm.pinned:
            self._cache.pin(warm.keys, warm.pin_until)
            self.registry.pin(warm.keys.chain, warm.pin_until)
            if self._hierarchy is not None:
                self._hierarchy.flush()
                self._hierarchy.pin(warm.keys.chain, warm.pin_until)
            warm.pinned = True

    def forget_warm(self, request_id: str) -> None:
        """Whether a warm-up request's blocks stay resident matters to nobody any longer. Its pins stay."""
        self._warm.pop(request_id, None)

    @property
    def ready(self) -> bool:
        """Whether everything that was to be warmed up is resident, on the device or below."""
        return all(self.residence(warm.keys).num_resident == len(warm.keys) for warm in self._warm.values())
