"""What a study held fixed, in words."""

import json
from collections.abc import Iterator
from typing import Any

from kvwise.study.loading_section import Loading
from kvwise.study.plan import Plan
from kvwise.study.scores import Basis
from kvwise.study.summary import Study


def held_fixed(study: Study) -> list[tuple[str, str]]:
    """Pairs of name and words: all that strategies had in common."""
    plan = study.plan
    live = not plan.quality_only
    pairs = [(f"traffic, {block.name}", _traffic(block)) for block in plan.block if live]
    pairs += [(f"loading, {table.name}", _loading(table)) for table in plan.loading if live]
    pairs += [
        ("prompts", "random token ids drawn with the seed, the same for all strategies of a condition and repeat"),
        ("decoding", "greedy; output lengths drawn, end tokens ignored"),
        ("engine", _engine(plan)),
        ("warm-up", "unrelated prompts before each cell, not measured; a fresh KV pool for each cell"),
        ("order", "repeats outermost, strategies innermost, another strategy first in each repeat"),
        *_quality(study),
        ("service levels", _given(plan.slo.model_dump(exclude_none=True)) or "none"),
        ("seed", str(plan.seed)),
        ("threads", " and ".join(sorted({str(row["threads"]) for row in study.cells})) or "unknown"),
    ]
    for name, speed in plan.links.items():
        pairs.append((f"link {name}", f"throttled to {speed}"))
    return pairs


def _quality(study: Study) -> Iterator[tuple[str, str]]:
    """How answers were asked for; of each basis that was measured."""
    quality = study.plan.quality
    bases = {q.basis for q in study.qualities}
    if Basis.TASKS in bases:
        answers = f"at least {quality.num_answers} answers a task (standard error {quality.standard_error:g} at most)"
        files = "".join(f"; {r.kind} records of {r.file}" for r in quality.records)
        yield "quality", f"{', '.join(quality.tasks)}; {' and '.join(quality.protocols)}; {answers}{files}"
        yield "answers", "the right answers of earlier questions are forced, the same contexts for all strategies"
    if Basis.AGREEMENT in bases:
        yield "agreement", f"{quality.prompts} prompts that share their first half, {quality.tokens} tokens each"


def _traffic(block: Any) -> str:
    load = block.load
    workload = {k: v for k, v in block.workload.model_dump(exclude_none=True).items() if k != "kind"}
    law = "Poisson" if load.burstiness == 1 else f"Gamma, burstiness {load.burstiness:g}"
    return (
        f"{block.workload.kind}: {_given(workload)}; arrivals {law}; {load.fewest} to {load.max_requests} "
        f"requests in about {load.duration_s:g} s, cut at {load.time_limit_s:g} s; {block.repeats} repeats"
    )


def _loading(table: Loading) -> str:
    """What all methods had in common where the first token was timed."""
    beside = "" if table.mixed is None else f", with {_given(table.mixed.model_dump())} tokens beside"
    return (
        f"prefix in {table.tier}, steps of {table.step_tokens} tokens, {table.repeats} runs, methods in turn over the "
        f"same prefix, the link throttled; one round before them is not counted{beside}"
    )


def _engine(plan: Plan) -> str:
    return _given(plan.engine.model_dump(exclude_none=True) | {"dtype": plan.dtype})


def _given(values: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items())
