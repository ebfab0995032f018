"""What the live view tells of this moment: engines, tiers, requests. No text of any request is in it."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvwise.cache.misses import MissReason
from kvwise.core.output import Attestation
from kvwise.engine.hierarchy.tier import TierStats
from kvwise.engine.service import EngineSnapshot
from kvwise.engine.stream import Stream
from kvwise.server.context import Server
from kvwise.server.live.figures import Ended
from kvwise.server.live.look import DEVICE, Progress

MOST_ROWS = 64  # requests that are told one by one
_KEPT = 9  # snapshots over which bandwidth is averaged: four seconds


@dataclass(slots=True)
class Rates:
    """Bytes a second that tiers move, from the counters of the last snapshots."""

    _seen: dict[str, deque[EngineSnapshot]] = field(default_factory=dict)  # by strategy

    def note(self, snapshots: list[EngineSnapshot]) -> None:
        """Take in the latest figures; what is not served any more is forgotten."""
        self._seen = {one.strategy: self._seen.get(one.strategy, deque(maxlen=_KEPT)) for one in snapshots}
        for one in snapshots:
            seen = self._seen[one.strategy]
            if seen and seen[-1].stats.num_steps > one.stats.num_steps:  # another engine under the same name
                seen.clear()
            seen.append(one)

    def of(self, strategy: str, tier: str) -> tuple[float, float]:
        """Bytes a second loaded and stored."""
        seen = self._seen.get(strategy)
        if not seen or tier not in seen[0].moved or (seconds := seen[-1].at - seen[0].at) <= 0:
            return 0.0, 0.0
        first, last = seen[0].moved[tier], seen[-1].moved[tier]
        return max(0, last.loaded - first.loaded) / seconds, max(0, last.stored - first.stored) / seconds


def about(server: Server) -> dict[str, Any]:
    """What does not change while the server runs."""
    loaded, config = server.service.loaded, server.service.config
    return {
        "model": server.model_names[0],
        "block_size": config.block_size,
        "layers_and_heads": loaded.num_layers * loaded.num_kv_heads,
        "max_num_seqs": config.max_num_seqs,
        "keys": server.tenants.has_keys,
        "admin": server.tenants.has_admin,
        "tenants": any(tenant.name for tenant in server.tenants.tenants),
    }


def engine(snapshot: EngineSnapshot, rates: Rates) -> dict[str, Any]:
    """One engine's figures."""
    stats = snapshot.stats
    return {
        "strategy": snapshot.strategy,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "preemptions": stats.num_preemptions,
        "evictions": snapshot.num_evicted,
        "leaked": snapshot.num_leaked,
        "blocks": {"total": stats.blocks_total, "free": stats.blocks_free, "cached": stats.blocks_cached},
        "misses": misses(snapshot.misses),
        "tiers": tiers(snapshot, rates),
        "links": [label for label in stats.links.values() if "(not throttled)" not in label],
    }


def misses(counts: Mapping[str, int]) -> dict[str, int]:
    """By reason, as anybody may read it."""
    found: dict[str, int] = {}
    for reason, count in counts.items():
        if count:
            found[told(reason)] = found.get(told(reason), 0) + count
    return found


def told(reason: str) -> str:
    """A reason as anybody may read it: what another salt has stored must not be seen by trying prompts."""
    return str(MissReason.NEVER_STORED if reason == MissReason.OTHER_SALT else reason)


def tiers(snapshot: EngineSnapshot, rates: Rates) -> list[dict[str, Any]]:
    """The device, then what lies below it."""
    stats, below = snapshot.stats, snapshot.stats.tiers
    told_ones = [{
        "name": DEVICE, "bytes": stats.kv_bytes.get(DEVICE, 0), "budget": stats.pool_bytes,
        "blocks": stats.blocks_total - stats.blocks_free, "hits": stats.prefix_hits, "asked": stats.prefix_queries,
    }]  # fmt: skip
    for name, num_bytes in stats.kv_bytes.items():
        tier = below.get(name)
        if name == DEVICE or (tier is None and not num_bytes):
            continue
        loading, storing = rates.of(snapshot.strategy, name)
        one = {"name": name, "bytes": num_bytes, "loading": round(loading), "storing": round(storing)}
        told_ones.append(one | (_tier(tier) if isinstance(tier, TierStats) else {}))
    return told_ones


def _tier(tier: TierStats) -> dict[str, Any]:
    return {
        "budget": tier.capacity_bytes, "blocks": tier.num_blocks, "hits": tier.hits, "asked": tier.hits + tier.misses,
        "evicted": tier.num_evicted, "expired": tier.num_expired, "faults": sum(tier.num_faults.values()),
        "up": tier.breaker == "closed",
    }  # fmt: skip


def request(server: Server, stream: Stream, progress: Progress | None, now: float) -> dict[str, Any]:
    """One request that has not ended; without `progress` no engine has seen it yet."""
    metrics, done = stream.metrics, stream.attestation
    progress = progress or Progress("waiting", 0, 0)
    loaded = server.service.loaded
    first = None if metrics is None else metrics.first_token
    return {
        "id": stream.request_id,
        "tenant": _name(server, stream.tenant),
        "phase": progress.phase,
        "strategy": stream.strategy,
        "prompt": stream.num_prompt,
        "output": stream.num_tokens,
        "computed": min(progress.computed, stream.num_prompt),
        "cached": min(progress.cached, stream.num_prompt),
        "age": round(now - stream.arrival, 1),
        "ttft": None if first is None else round(first - stream.arrival, 4),
        "did": attested(done, loaded.num_layers * loaded.num_kv_heads),
    }


def ended(one: Ended, places: int) -> dict[str, Any]:
    """One request that has."""
    record = one.record
    metrics = record.metrics[0] if record.metrics else None
    first = record.first_token if record.streams or metrics is None else metrics.first_token
    return {
        "number": one.number,
        "id": record.answer_id or record.request_id,
        "tenant": record.tenant,
        "end": record.error or (record.finish_reasons[0] if record.finish_reasons else str(record.status)),
        "ok": record.error is None and record.status < 400,
        "strategy": record.strategy,
        "prompt": record.num_prompt,
        "output": record.num_output,
        "cached": record.num_cached,
        "ttft": None if first is None else round(first - record.arrival, 4),
        "took": None if record.finished is None else round(record.finished - record.arrival, 3),
        "miss": None if metrics is None or metrics.miss is None else _reason(metrics.miss),
        "did": attested(record.attestations[0] if record.attestations else None, places),
    }


def attested(done: Attestation | None, places: int) -> dict[str, float] | None:
    """What the methods did to a request; tokens kept, dropped and merged count once in each layer and head."""
    if done is None:
        return None
    return {
        "kept": max(0, done.tokens_seen * places - done.tokens_dropped - done.tokens_merged),
        "dropped": done.tokens_dropped,
        "merged": done.tokens_merged,
        "recalled": done.tokens_fetched,
        "loaded": done.tokens_loaded,
        "bits": round(done.bits_per_element, 2),
    }


def _reason(miss: str) -> str:
    """The reason alone: what follows it may name what others have stored, and when."""
    said = miss.partition(": ")[2]
    return told(next((str(reason) for reason in MissReason if said.startswith(str(reason))), "other"))


def _name(server: Server, tenant_id: str) -> str:
    tenant = server.tenants.of_id(tenant_id)
    return "" if tenant is None else tenant.name
