"""The page's verdict: what to run, who wins where, whom the quality floor leaves out, where the winner changes."""

from html import escape

from kvwise.study import words
from kvwise.study.markup import bullets, table, who
from kvwise.study.palette import short
from kvwise.study.recommend import Recommendation, Rejection, Verdict
from kvwise.study.summary import Study
from kvwise.study.verdict import Decision


def verdict_section(study: Study, verdict: Verdict, paint: dict[str, str]) -> str:
    """The section with its heading; without any traffic it says why there is no winner."""
    if not verdict.decisions:
        return "\n".join(
            ['<h2 id="verdict">Verdict</h2>', f"<p>{_nothing(study)}</p>", *_rejected(study, verdict.rejections)]
        )
    return "\n".join(
        [
            '<h2 id="verdict">Verdict: what to run</h2>',
            '<div class="cards">',
            *(_card(advice, paint) for advice in verdict.recommendations),
            "</div>",
            *_nobody(study, verdict),
            *_caveats(study),
            *_rejected(study, verdict.rejections),
            "<h3>Winner under each condition</h3>",
            table(
                ["Block", "Model", "Condition", "Winner", "Figures", "Ahead", "Quality", "KV peak"],
                [_decision_row(decision, paint) for decision in verdict.decisions],
                numeric=(5, 6),
                stack=True,
            ),
            _rule_text(study),
            "<h3>Where the winner changes</h3>",
            bullets(
                [words.crossover(c) for c in verdict.crossovers]
                + [words.budget_crossover(c) for c in verdict.budget_crossovers],
                "Nowhere: the same strategy wins, or ties, along every axis.",
            ),
        ]
    )


def _nothing(study: Study) -> str:
    if study.qualities:
        return "Only quality was measured: without traffic nobody is fastest, so there is no winner."
    if study.loading:
        return "Only loading was measured: without traffic nobody is fastest, so there is no winner."
    return "No cell was measured, so there is nothing to compare."


def _nobody(study: Study, verdict: Verdict) -> list[str]:
    """Models of which no strategy reaches the quality floor: there is nothing to recommend."""
    models = dict.fromkeys(f.condition.model for f in study.figures)
    left = [m for m in models if m not in {r.model for r in verdict.recommendations}]
    if study.plan.min_quality is None or not left:
        return []
    names = ", ".join(map(short, left))
    return [f'<p class="notice">No strategy reaches the quality floor on {escape(names)}: nothing to recommend.</p>']


def _rejected(study: Study, rejections: tuple[Rejection, ...]) -> list[str]:
    """Whom the quality floor leaves out, per model, and on what grounds."""
    floor = study.plan.min_quality
    if floor is None:
        return []
    title = f"<h3>Left out by the quality floor of {words.number(floor)}</h3>"
    if not rejections:
        return [title, "<p>Nobody: every strategy reaches it.</p>"]
    out = [title]
    for ground, told in words.rejections(rejections, floor):
        out += [f'<p class="soft small">{escape(ground)}</p>', bullets(told)]
    return out


def _card(advice: Recommendation, paint: dict[str, str]) -> str:
    more = [words.frugal(advice.frugal)] if advice.frugal else []
    if advice.without_floor:
        more.append(f"without the quality floor: {advice.without_floor.who.label}")
    small = "".join(f'<p class="small">{escape(text)}</p>' for text in more)
    return (
        f'<div class="card" style="--hue:{paint[advice.figures.who.framework]}"><div class="model">'
        f"{escape(advice.model)}</div>"
        f'<div class="pick">{escape(advice.figures.who.label)}</div><div>{escape(words.advice(advice))}</div>'
        f"<pre>run: {escape(advice.command)}</pre>{small}</div>"
    )


def _caveats(study: Study) -> list[str]:
    models = dict.fromkeys(row["model"] for row in study.cells)
    drawn = [short(model) for model in models if model.startswith("random:")]
    if not drawn:
        return []
    some = "The weights are random" if len(drawn) == len(models) else f"The weights of {', '.join(drawn)} are random"
    return [
        f'<p class="soft small">{escape(some)}: times and memory are those of the shape, while agreement '
        "tells how far a method's logits move from the full cache's, not how good a trained model's answers are.</p>"
    ]


def _decision_row(decision: Decision, paint: dict[str, str]) -> list[str]:
    pick = decision.winner
    given = decision.condition
    if pick is None:
        name = '<span class="tie">tie</span>' if decision.tied else '<span class="bad">none</span>'
        likely = decision.pick
        hint = f" (best quality: {likely.who.label})" if likely else ""
        quality, peak = "", ""
        figures = escape(words.outcome(decision) + hint)
    else:
        name = who(pick.who, paint)
        quality = words.score(pick.quality)
        peak = escape(words.tiers(pick.peak_kv))
        figures = escape(words.outcome(decision).partition(": ")[2])
    if decision.without_floor is not None:
        figures += f'<div class="soft small">{escape(words.without_floor(decision))}</div>'
    return [
        escape(given.block),
        escape(short(given.model)),
        escape(words.condition(given)),
        name,
        figures,
        words.factor(decision),
        quality,
        peak,
    ]


def _rule_text(study: Study) -> str:
    plan = study.plan
    levels = ", ".join(
        f"{name} ≤ {value:g} ms"
        for name, value in (("TTFT", plan.slo.ttft_ms), ("TPOT", plan.slo.tpot_ms), ("E2E", plan.slo.e2e_ms))
        if value is not None
    )
    order = "goodput, then throughput, then median latency" if levels else "throughput, then median latency"
    floor = ""
    if plan.min_quality is not None:
        floor = (
            f" Strategies whose quality is below {words.number(plan.min_quality)} (the value itself, whatever its "
            "error), or was not measured, are left out."
        )
    good = f" Good requests meet {escape(levels)}." if levels else ""
    return (
        f'<p class="soft small">Decided by {order}; what overlaps in its 95 % bootstrap interval, or differs by less '
        f"than {words.share(plan.tie_margin)} (twice that where there is one repeat only), ties, and the next measure "
        f"decides.{good}{floor}</p>"
    )
