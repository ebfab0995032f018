"""Purges of one engine, each followed by a look-up in every tier. All run on the engine's thread."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.names import tag_text
from kvwise.engine.lifecycle import Owner, PurgeReport
from kvwise.server.admin.schema import PurgedEngine, PurgedTier

DEVICE = "device"


def everything_of(engine: Engine) -> PurgedEngine:
    """Forget everything."""
    report = engine.lifecycle.purge_all()
    return _answer(engine, report, _left(engine, None))


def tenant_of(engine: Engine, tenant: str) -> PurgedEngine:
    """Forget what requests of a tenant (its id) have stored; the nameless one stored what has no owner."""
    report = engine.lifecycle.purge_tenant(tenant)
    return _answer(engine, report, _left(engine, tenant))


def prompt_of(engine: Engine, tokens: Sequence[int], owner: Owner) -> PurgedEngine:
    """Forget the blocks of a prompt under an owner's salt."""
    keys = engine.lifecycle.keys(tokens, owner)
    report = engine.lifecycle.purge_prefix(keys)
    return _answer(engine, report, _found(engine, keys.chain))


def session_of(engine: Engine, session: str) -> PurgedEngine:
    """End a session's requests and forget what only it holds."""
    before = set(engine.lifecycle.registry.links(session))
    report = engine.purge_session(session)
    shared = set(engine.lifecycle.registry.links(session))  # a purge forgets the others
    return _answer(engine, report, _found(engine, list(before - shared)))


def _found(engine: Engine, keys: Sequence[bytes]) -> Mapping[str, int]:
    """How many of `keys` each tier still finds."""
    found = Counter({DEVICE: sum(map(engine.memory.cache.is_stored, keys))})
    if (hierarchy := engine.memory.hierarchy) is not None:
        for key in keys:
            for block in hierarchy.find([key]):
                found.update({hierarchy.tiers[tier].name for tier in block.tiers if tier is not None})
    return found


def _left(engine: Engine, tenant: str | None) -> Mapping[str, int]:
    """How many blocks of a tenant (None: of anybody) each tier still has."""
    cache, hierarchy = engine.memory.cache, engine.memory.hierarchy
    left = Counter({DEVICE: sum(tenant is None or terms.tenant == tenant for _, terms in cache.stored())})
    for tier in [] if hierarchy is None else hierarchy.tiers:
        left[tier.name] = len(tier.keys_where(None if tenant is None else tag_text(tenant)))
    return left


def _answer(engine: Engine, report: PurgeReport, found: Mapping[str, int]) -> PurgedEngine:
    tiers = [
        PurgedTier(
            tier=one.tier, blocks=one.num_blocks, bytes=one.num_bytes, overwritten=one.overwritten,
            found_again=found.get(one.tier, 0),
        )
        for one in report.tiers
    ]  # fmt: skip
    return PurgedEngine(strategy=str(engine.strategy), tiers=tiers, shared=report.num_shared, in_use=report.num_in_use)
