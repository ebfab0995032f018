"""What the live view asks an engine, between two of its steps: the map of its blocks, and how far requests are."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvwise.engine.engine import Engine
from kvwise.engine.lifecycle import Owner
from kvwise.server.live.map import Holders

DEVICE, NOWHERE = "device", "none"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request's first sample is. Tokens, found on the device and brought back from below."""

    phase: str  # waiting, prefill, decode or finished
    computed: int
    cached: int


@dataclass(frozen=True, slots=True)
class Look:
    """One engine at one moment."""

    held: Holders
    progress: Mapping[str, Progress]  # by request id


def look(engine: Engine) -> Look:
    """To be called on the engine's thread."""
    progress = {}
    for one in engine.first_samples():
        progress[one.request_id] = Progress(one.phase.name.lower(), one.num_computed, one.metrics.num_cached_tokens)
    return Look(engine.memory.cache.occupancy(), progress)


def holders(engine: Engine, block: int) -> list[str]:
    """Ids of the requests that hold a whole block, of those with several samples by their first."""
    cache = engine.memory.cache
    rows = [(one.request_id, one.row) for one in engine.first_samples() if one.row is not None]
    return [name for name, row in rows if block in cache.tables[row, : cache.num_blocks[row]]]


def places(engine: Engine, tokens: list[int], tenant: str, cache_salt: str) -> tuple[int, list[tuple[str, int]]]:
    """How many full blocks a tenant's prompt has, and where they are, in order: runs of (tier, blocks).

    The last run, `none`, is of blocks that would have to be computed. Only what a request of the tenant's would find.
    """
    keys = engine.lifecycle.keys(tokens, Owner(tenant, cache_salt=cache_salt))
    here = engine.memory.cache.num_resident(keys)
    where = [DEVICE] * here
    if (hierarchy := engine.memory.hierarchy) is not None:
        for block in hierarchy.find(keys.chain[here:]):
            tier = block.tiers[block.best]
            assert tier is not None
            where.append(hierarchy.tiers[tier].name)
    where += [NOWHERE] * (len(keys) - len(where))
    return len(keys), _runs(where)


def _runs(where: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for place in where:
        last, count = runs[-1] if runs else ("", 0)
        if place == last:
            runs[-1] = (place, count + 1)
        else:
            runs.append((place, 1))
    return runs
