"""What a study held fixed, in words."""

import json
from typing import Any

from kvwise.study.plan import Plan
from kvwise.study.summary import Study


def held_fixed(study: Study) -> list[tuple[str, str]]:
    """Pairs of name and words: all that strategies had in common."""
    plan = study.plan
    pairs = [(f"traffic, {block.name}", _traffic(block)) for block in plan.block]
    pairs += [
        ("prompts", "random token ids drawn with the seed, the same for all strategies of a condition and repeat"),
        ("decoding", "greedy; output lengths drawn, end tokens ignored"),
        ("engine", _engine(plan)),
        ("warm-up", "unrelated prompts before each cell, not measured; a fresh KV pool for each cell"),
        ("order", "repeats outermost, strategies innermost, another strategy first in each repeat"),
        ("agreement", f"{plan.quality.prompts} prompts that share their first half, {plan.quality.tokens} tokens each"),
        ("service levels", _given(plan.slo.model_dump(exclude_none=True)) or "none"),
        ("seed", str(plan.seed)),
        ("threads", " and ".join(sorted({str(row["threads"]) for row in study.cells})) or "unknown"),
    ]
    for name, speed in plan.links.items():
        pairs.append((f"link {name}", f"throttled to {speed}"))
    return pairs


def _traffic(block: Any) -> str:
    load = block.load
    workload = {k: v for k, v in block.workload.model_dump(exclude_none=True).items() if k != "kind"}
    law = "Poisson" if load.burstiness == 1 else f"Gamma, burstiness {load.burstiness:g}"
    return (
        f"{block.workload.kind}: {_given(workload)}; arrivals {law}; {load.fewest} to {load.max_requests} "
        f"requests in about {load.duration_s:g} s, cut at {load.time_limit_s:g} s; {block.repeats} repeats"
    )


def _engine(plan: Plan) -> str:
    return _given(plan.engine.model_dump(exclude_none=True) | {"dtype": plan.dtype})


def _given(values: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())
