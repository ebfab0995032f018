"""A study of answers that nobody gave: rows with the accuracies asked for, and figures to go with them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from kvwise.study.bootstrap import Interval
from kvwise.study.cells import framework_of
from kvwise.study.plan import Plan
from kvwise.study.rows import Row, schema
from kvwise.study.scores import quality_figures
from kvwise.study.summary import Condition, Figures, Study, Who
from tests.study.conftest import PROVENANCE, make_plan

MODEL, CONTEXT = "builtin:recall", 512
BUDGETS = (0.5, 0.25, 0.125, 0.06)
TASKS = ("recall", "multi_value", "tracking", "counting", "copy", "early_fact")
KEPT_BYTES = 512  # of the full cache's token

# Right answers by budget, as BUDGETS: what a small model did.
CURVES: dict[str, tuple[float, ...]] = {
    "window(budget={budget})": (0.53, 0.29, 0.15, 0.09),
    "random(budget={budget})": (0.63, 0.35, 0.21, 0.11),
    "h2o(budget={budget})": (0.76, 0.39, 0.10, 0.04),
    "snapkv(budget={budget})": (1.0, 0.73, 0.39, 0.15),
    "infinigen(budget={budget})": (1.0, 0.97, 0.85, 0.55),
    "topk(budget={budget})": (1.0, 1.0, 0.98, 0.93),
}
# Tasks differ in how hard they are: accuracies are raised to this power.
HARDNESS = {"recall": 1.0, "multi_value": 1.6, "tracking": 2.2, "counting": 0.35, "copy": 1.2, "early_fact": 1.1}

PLAN = """
name = "answers"
[[block]]
name = "main"
strategies = ["full", "h2o(budget={budget})", "infinigen(budget={budget})"]
budgets = [0.5, 0.25, 0.125, 0.06]
models = ["builtin:recall"]
request_rates = [4.0, 16.0]
context_lengths = [512]
[block.workload]
kind = "random"
"""


def strategies(curves: Mapping[str, tuple[float, ...]] = CURVES) -> Iterator[tuple[Who, float]]:
    """Every strategy with its accuracy on a task of hardness 1; the full cache first."""
    yield Who("full", None, "full"), 1.0
    for template, accuracies in curves.items():
        for budget, accuracy in zip(BUDGETS, accuracies, strict=True):
            text = template.replace("{budget}", f"{budget:g}")
            yield Who(framework_of(text), budget, text), accuracy


def answer_rows(
    who: Who,
    rights: Mapping[str, float],
    *,
    model: str = MODEL,
    context: int = CONTEXT,
    episodes: int = 24,
    questions: int = 12,
    protocol: str = "multi-turn",
) -> list[Row]:
    """Answers to every task of `rights`: exactly that share is right, spread over the episodes. None right: nats."""
    out = []
    for task, share in rights.items():
        order = np.random.default_rng(sum(map(ord, task + who.strategy))).permutation(episodes * questions)
        for number, place in enumerate(order.tolist()):
            right = place < round(share * episodes * questions)
            out.append({
                "cell": f"{model}-{context}-{who.strategy}", "model": model, "context": context,
                "strategy": who.strategy, "framework": who.framework, "budget": who.budget, "task": task,
                "protocol": protocol, "episode": number // questions, "question": number % questions, "num_tokens": 1,
                "right": None if task == "continuation" else right, "score": None,
                "nll_nats": 0.05 + 3 * (1 - share) + 0.1 * (number % 3),
                "same_top1": float(right), "kl_nats": 0.0 if right else 2.0, "depth": 0.5,
            })  # fmt: skip
    return out


def cell_row(who: Who, held: Mapping[str, float], *, model: str = MODEL, context: int = CONTEXT) -> Row:
    """The row of a quality cell that ended well."""
    given = {
        "cell": f"{model}-{context}-{who.strategy}", "kind": "quality", "block": "quality", "model": model,
        "strategy": who.strategy, "framework": who.framework, "budget": who.budget, "context": context,
        "memory": "auto", "repeat": 0, "status": "done", "kv_bytes_per_token": dict(held),
        "recorded_at": "2026-01-01T00:00:00+00:00", "plan_hash": "0123456789abcdef",
    }  # fmt: skip
    return dict.fromkeys(schema("cells").names) | PROVENANCE | given


def held_by(who: Who) -> dict[str, float]:
    """KV bytes per token by tier: selection methods hold all on the host."""
    if who.framework in ("infinigen", "topk"):
        return {"device": KEPT_BYTES * (0.04 + (who.budget or 1.0) / 8), "host": float(KEPT_BYTES)}
    return {"device": KEPT_BYTES * (who.budget or 1.0)}


def make_study(plan: Plan | None = None, *, live: bool = True, protocols: tuple[str, ...] = ("multi-turn",)) -> Study:
    """A study of the curves above, with traffic of three frameworks if `live`."""
    answers, cells = [], []
    for who, accuracy in strategies():
        cells.append(cell_row(who, held_by(who)))
        rights = {task: accuracy ** HARDNESS[task] for task in TASKS} | {"continuation": accuracy}
        for protocol in protocols:
            answers += answer_rows(who, rights, protocol=protocol)
    study = Study(
        "answers", plan or make_plan(PLAN), cells=cells, requests=[], samples=[], answers=answers, onoff=[],
        qualities=quality_figures(answers, cells),
    )  # fmt: skip
    if live:
        study.figures = list(live_figures(study))
    return study


def agreement_rows(who: Who, model: str, context: int = 256) -> list[Row]:
    """Agreement on random prompts: the less is kept, the less."""
    kept = 1.0 if who.budget is None else who.budget
    return [
        row | {"task": "agreement", "protocol": "forced", "right": None, "nll_nats": None,
               "same_top1": kept ** 0.1, "kl_nats": 0.3 * (1 - kept)}
        for row in answer_rows(who, {"agreement": 1.0}, model=model, context=context, episodes=4, questions=1)
    ]  # fmt: skip


def live_figures(study: Study) -> Iterator[Figures]:
    """The less is read, the faster; the full cache is slowest."""
    known = {q.who.strategy: q for q in study.qualities}
    for rate in (4.0, 16.0):
        for who, _ in strategies():
            if who.framework not in ("full", "h2o", "infinigen"):
                continue
            kept = who.budget or 1.0
            speed = rate * (1.6 - kept) * (0.8 if who.framework == "infinigen" else 1.0)
            yield figures_of(who, speed, rate=rate, held=held_by(who)["device"] * 4096, quality=known[who.strategy])


def point(value: float, width: float = 0.0) -> Interval:
    """A value with an interval `width` to either side."""
    return Interval(value, value - width, value + width)


def figures_of(who: Who, speed: float, *, rate: float = 8.0, held: float = 1024.0, **more: object) -> Figures:
    """Figures of a strategy that does `speed` requests per second."""
    given = Figures(
        condition=Condition("main", MODEL, CONTEXT, "auto", math.inf, rate), who=who, repeats=2, num_requests=10,
        num_finished=10, num_cut=0, goodput=point(speed), request_rate=point(speed), output_rate=point(16 * speed),
        total_rate=point(600 * speed), attainment=1.0, ttft={50.0: point(0.05), 99.0: point(0.08)},
        tpot={50.0: point(0.01)}, itl={50.0: point(0.01)}, e2e={50.0: point(1 / speed)}, peak_kv={"device": held},
        mean_kv={"device": held}, pool_bytes=1 << 24, hit_ratio=None, preemptions=0, links={},
    )  # fmt: skip
    return replace(given, **more)  # type: ignore[arg-type]
