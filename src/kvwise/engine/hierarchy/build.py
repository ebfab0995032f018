"""Makes the tiers that a configuration names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvwise.cache.identity import Identity
from kvwise.cache.manager import CacheManager
from kvwise.cache.residency import TierIndex
from kvwise.core.clock import Clock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.core.tiering import TierSpec
from kvwise.engine.hierarchy.device import DeviceBlocks
from kvwise.engine.hierarchy.hierarchy import Hierarchy
from kvwise.engine.hierarchy.names import tag_text
from kvwise.engine.hierarchy.pins import PinFile
from kvwise.engine.hierarchy.tier import Tier
from kvwise.tiers.arena import Arena
from kvwise.tiers.base import ByteStore
from kvwise.tiers.breaker import Breaker
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.disk import DiskStore
from kvwise.tiers.host import HostStore
from kvwise.tiers.memory_store import MemoryStore
from kvwise.tiers.object import ObjectStore
from kvwise.tiers.pace import Pace
from kvwise.tiers.record import header_bytes
from kvwise.tiers.redis import RedisStore

SMALLEST = 16  # a record is at least so many times smaller than a block: bounds the books of a tier
MOST_HELD = 4  # at most one in so many device blocks is held for storing
_MOST_BLOCKS = 1 << 22


def make_tier(
    spec: TierSpec, layout: KVLayout, clock: Clock, links: Mapping[str, float], quotas: Mapping[str, int] | None = None
) -> Tier:
    """Open one tier. UsageError if its policy is unknown or its place cannot be used."""
    smallest = max(1, layout.block_bytes // SMALLEST)
    index = TierIndex(
        spec.kind,
        policy_name=spec.policy,
        clock=clock,
        capacity_bytes=spec.size_bytes,
        max_blocks=min(max(1, spec.size_bytes // smallest), _MOST_BLOCKS),
        quotas=quotas,
    )
    above = "device" if spec.kind == "host" else "host"
    down, up = f"{above}:{spec.kind}", f"{spec.kind}:{above}"
    return Tier(
        index,
        _store(spec, layout, clock),
        Breaker(spec.kind, clock),
        read_pace=Pace(up, links.get(up), clock),
        write_pace=Pace(down, links.get(down), clock),
        clock=clock,
        pin_file=PinFile(spec.where) if spec.kind == "disk" else None,
    )


def link_names(tiers: Sequence[TierSpec]) -> list[str]:
    """Names of the links that these tiers have, both directions."""
    pairs = [("device" if tier.kind == "host" else "host", tier.kind) for tier in tiers]
    return [f"{a}:{b}" for pair in pairs for a, b in (pair, pair[::-1])]


def _store(spec: TierSpec, layout: KVLayout, clock: Clock) -> ByteStore:
    record_bytes = layout.block_bytes + header_bytes(layout.num_layers)
    if spec.kind == "host":
        if spec.size_bytes < record_bytes:
            raise UsageError(
                f"tier host of {spec.size_bytes} bytes holds not one block of {record_bytes} bytes: raise its size"
            )
        return HostStore(spec.size_bytes)
    if spec.kind == "disk":
        return DiskStore(Path(spec.where), clock=clock)
    if spec.kind == "redis":
        return RedisStore(spec.where)
    if spec.kind == "object":
        return ObjectStore(spec.where)
    return MemoryStore()


def make_tiers(config: EngineConfig, layout: KVLayout, clock: Clock) -> list[Tier]:
    """Open all tiers of a configuration, fastest first."""
    quotas = {tag_text(tenant): limit for tenant, limit in config.tenant_quotas.items()}
    return [make_tier(spec, layout, clock, config.links, quotas) for spec in config.tiers]


def make_hierarchy(
    config: EngineConfig, tiers: Sequence[Tier], codec: Codec, arena: Arena, cache: CacheManager, identity: Identity,
    clock: Clock,
) -> Hierarchy:  # fmt: skip
    """Put the tiers below one device pool."""
    return Hierarchy(
        tiers,
        codec,
        DeviceBlocks(arena),
        identity,
        clock,
        let_go=cache.let_go,
        note_foreign=cache.note_foreign,
        through=config.offload == "through",
        store_after=config.store_after,
        most_held=max(1, arena.num_blocks // MOST_HELD),
    )
