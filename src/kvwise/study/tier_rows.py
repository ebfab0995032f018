"""Columns of the tiers below the device: what was found there, what was decided about it, and what that cost."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from kvwise.core.output import RequestOutput
from kvwise.engine.hierarchy.tier import TierStats
from kvwise.study.live import Drive

_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
_COUNTS = pa.map_(_TEXT, _WHOLE)

TIERS = {
    "tier_hits": _COUNTS,  # per tier below the device: blocks found at admissions
    "tier_misses": _COUNTS,  # blocks looked up there and not found, up to the first that no tier had
    "tier_hit_ratio": pa.map_(_TEXT, _REAL),  # hits / (hits + misses)
    "tier_token_share": pa.map_(_TEXT, _REAL),  # of the prompt tokens looked up: found on the device, or in a tier
    "tier_bytes": _COUNTS,  # at the end
    "tier_faults": _COUNTS,
    "loads": _COUNTS,  # decision -> requests: compute, load, both
    "mean_regret_s": _REAL,  # of those requests, against the better fixed choice
    "tokens_loaded": _WHOLE,
}
LOAD_REPORT = {
    "decision": _TEXT,  # compute, load or both; null: nothing was stored
    "expected_compute_s": _REAL,  # what the two fixed choices should have taken
    "expected_load_s": _REAL,
    "regret_s": _REAL,  # the time it took minus the better of them
}


def tier_columns(drive: Drive) -> dict[str, Any]:
    """What the tiers below did from the first figure to the last, the warm-up left out."""
    if drive.first is None or drive.last is None:
        return {}
    before = {name: cast(TierStats, tier) for name, tier in drive.first.tiers.items()}
    after = {name: cast(TierStats, tier) for name, tier in drive.last.tiers.items()}
    hits = {name: tier.hits - before[name].hits for name, tier in after.items()}
    misses = {name: tier.misses - before[name].misses for name, tier in after.items()}
    asked = {name: hits[name] + misses[name] for name in after}
    tokens = drive.last.prefix_queries - drive.first.prefix_queries
    found = {"device": drive.last.prefix_hits - drive.first.prefix_hits}
    found |= {name: count * drive.block_tokens for name, count in hits.items()}
    return {
        "tier_hits": hits,
        "tier_misses": misses,
        "tier_hit_ratio": {name: hits[name] / count for name, count in asked.items() if count},
        "tier_token_share": {name: count / tokens for name, count in found.items()} if tokens and after else {},
        "tier_bytes": {name: tier.num_bytes for name, tier in after.items()},
        "tier_faults": {name: _faults(tier) - _faults(before[name]) for name, tier in after.items()},
    }


def _faults(tier: TierStats) -> int:
    return sum(tier.num_faults.values())


def load_columns(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the requests of a cell were decided about, and what that cost."""
    decided = [r for r in requests if r.get("decision") is not None]
    regrets = [r["regret_s"] for r in decided if r["regret_s"] is not None]
    return {
        "loads": dict(Counter(r["decision"] for r in decided)),
        "mean_regret_s": float(np.mean(regrets)) if regrets else None,
        "tokens_loaded": sum(r.get("tokens_loaded", 0) for r in requests),
    }


def load_report(output: RequestOutput) -> dict[str, Any]:
    """The columns of what became of a request's stored prefix."""
    report = output.metrics.load
    if report is None:
        return dict.fromkeys(LOAD_REPORT)
    return {
        "decision": report.decision,
        "expected_compute_s": report.compute_s,
        "expected_load_s": report.load_s,
        "regret_s": report.regret_s,
    }
