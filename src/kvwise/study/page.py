"""The report: one HTML file that needs nothing else. The verdict first, then the charts, then how it was measured."""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise

from plotly.offline import get_plotlyjs

from kvwise.study import words
from kvwise.study.chart import Chart
from kvwise.study.charts import onoff_times, study_charts
from kvwise.study.fixed import held_fixed
from kvwise.study.palette import Palette, short, slug
from kvwise.study.plotly_chart import plotly_chart
from kvwise.study.recommend import Recommendation, Verdict
from kvwise.study.summary import Figures, Study
from kvwise.study.verdict import Decision


def render(study: Study, verdict: Verdict) -> str:
    """The whole page as text."""
    charts = study_charts(study)
    paint = Palette(study).colours
    sections = list(dict.fromkeys(chart.section for chart in charts))
    body = [
        _head(study, sections),
        _verdict(study, verdict, paint),
        *(_section(name, [c for c in charts if c.section == name], study) for name in sections),
        _fixed(study),
        _failed(study),
        _all_figures(study, paint),
        _provenance(study),
    ]
    drawn = json.dumps({chart.id: plotly_chart(chart) for chart in charts}).replace("</", "<\\/")
    return _PAGE.format(
        title=escape(study.name),
        css=_resource("page.css"),
        body="\n".join(body),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        charts=drawn,
        js=_resource("page.js"),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvwise study: {title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{charts}</script>
<script>{plotly}</script>
<script>{js}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return files("kvwise.study").joinpath(name).read_text(encoding="utf-8")


def _head(study: Study, sections: Sequence[str]) -> str:
    cells = len(study.cells) - len(study.failed)
    models = ", ".join(dict.fromkeys(short(row["model"]) for row in study.cells))
    links = [("Verdict", "verdict"), *((name, slug(name)) for name in sections), ("Held fixed", "fixed")]
    notices = [f"Link {escape(f'{name}: {text}')}." for name, text in sorted(study.links.items())]
    if study.num_left:
        notices.append(f"{study.num_left} cells of the plan are not measured yet: run the same command to go on.")
    if study.failed:
        notices.append(f'{len(study.failed)} cells failed: <a href="#failed">which and why</a>.')
    return "\n".join(
        [
            f"<h1>KV cache study: {escape(study.name)}</h1>",
            f'<p class="lead">{cells} cells measured on one engine, on {escape(models)}; strategies differ, all else '
            "is the same.</p>",
            "<nav>" + "".join(f'<a href="#{target}">{escape(name)}</a>' for name, target in links) + "</nav>",
            *(f'<p class="notice">{text}</p>' for text in notices),
        ]
    )


# -- the verdict ------------------------------------------------------------------------------------------------------


def _verdict(study: Study, verdict: Verdict, paint: dict[str, str]) -> str:
    if not verdict.decisions:
        return '<h2 id="verdict">Verdict</h2><p>No cell was measured, so there is nothing to compare.</p>'
    return "\n".join(
        [
            '<h2 id="verdict">Verdict: what to run</h2>',
            '<div class="cards">',
            *(_card(advice, paint) for advice in verdict.recommendations),
            "</div>",
            *_caveats(study),
            "<h3>Winner under each condition</h3>",
            _table(
                ["Block", "Model", "Condition", "Winner", "Figures", "Ahead", "Agreement", "KV peak"],
                [_decision_row(decision, paint) for decision in verdict.decisions],
                numeric=(5, 6),
                stack=True,
            ),
            _rule_text(study),
            "<h3>Where the winner changes</h3>",
            _bullets(
                [words.crossover(c) for c in verdict.crossovers]
                + [words.budget_crossover(c) for c in verdict.budget_crossovers],
                "Nowhere: the same strategy wins, or ties, along every axis.",
            ),
        ]
    )


def _card(advice: Recommendation, paint: dict[str, str]) -> str:
    frugal = f'<p class="small">{escape(words.frugal(advice.frugal))}</p>' if advice.frugal else ""
    return (
        f'<div class="card" style="--hue:{paint[advice.figures.who.framework]}"><div class="model">'
        f"{escape(advice.model)}</div>"
        f'<div class="pick">{escape(advice.figures.who.label)}</div><div>{escape(words.advice(advice))}</div>'
        f"<pre>run: {escape(advice.command)}</pre>{frugal}</div>"
    )


def _caveats(study: Study) -> list[str]:
    models = dict.fromkeys(row["model"] for row in study.cells)
    if not any(model.startswith("random:") for model in models):
        return []
    return [
        '<p class="soft small">The weights are random: times and memory are those of the shape, while agreement '
        "tells how far a method's logits move from the full cache's, not how good a trained model's answers are.</p>"
    ]


def _decision_row(decision: Decision, paint: dict[str, str]) -> list[str]:
    pick = decision.winner
    given = decision.condition
    if pick is None:
        name = '<span class="tie">tie</span>' if decision.tied else '<span class="bad">none</span>'
        likely = decision.pick
        hint = f" (nearest to the full cache: {likely.who.label})" if likely else ""
        agreed, peak = "", ""
        figures = escape(words.outcome(decision) + hint)
    else:
        name = _who(pick, paint)
        agreed = words.share(pick.agreement.value) if pick.agreement else "–"
        peak = escape(words.tiers(pick.peak_kv))
        figures = escape(words.outcome(decision).partition(": ")[2])
    return [
        escape(given.block),
        escape(short(given.model)),
        escape(words.condition(given)),
        name,
        figures,
        words.factor(decision),
        agreed,
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
    floor = (
        f" Strategies below {words.share(plan.agreement_floor)} agreement are left out."
        if plan.agreement_floor is not None
        else ""
    )
    good = f" Good requests meet {escape(levels)}." if levels else ""
    return (
        f'<p class="soft small">Decided by {order}; what overlaps in its 95 % bootstrap interval, or differs by less '
        f"than {words.share(plan.tie_margin)} (twice that where there is one repeat only), ties, and the next measure "
        f"decides.{good}{floor}</p>"
    )


# -- sections ---------------------------------------------------------------------------------------------------------


def _section(name: str, charts: Sequence[Chart], study: Study) -> str:
    extra = _onoff_table(study) if any(chart.id.startswith("onoff") for chart in charts) else ""
    figures = "\n".join(
        f"<figure><h3>{escape(c.title)}</h3><figcaption>{escape(c.note)}</figcaption>"
        f'<div class="plot" id="{c.id}" role="img" aria-label="{escape(c.section)}: {escape(c.title)}"></div></figure>'
        for c in charts
    )
    return f'<h2 id="{slug(name)}">{escape(name)}</h2>\n{extra}<div class="grid">\n{figures}\n</div>'


def _onoff_table(study: Study) -> str:
    times = onoff_times(study)
    lengths = sorted({length for _, length in times})
    rows = []
    ratios = []
    for length in lengths:
        off, on, own = (times.get((side, length), math.nan) for side in ("hf-off", "hf-on", "kvwise"))
        ratios.append(off / on)
        rows.append(
            [str(length), f"{off:.3f} s", f"{on:.3f} s", f"{off / on:.2f}×", f"{own:.3f} s", f"{off / own:.2f}×"]
        )
    grows = all(a < b for a, b in pairwise(ratios))
    told = '<span class="good">grows with the output</span>' if grows else '<span class="bad">does not grow</span>'
    head = ["Output tokens", "no cache", "cache", "ratio", "kvwise", "ratio"]
    return (
        f"<p>Greedy tokens are identical on all sides; the ratio {told}. Beside it, {escape(words.ARTICLE)}.</p>"
        + _table(head, rows, numeric=range(6))
    )


def _fixed(study: Study) -> str:
    return '<h2 id="fixed">What was held fixed</h2>\n' + _pairs(held_fixed(study))


def _failed(study: Study) -> str:
    if not study.failed:
        return '<h2 id="failed">Failed cells</h2><p>None.</p>'
    rows = [
        [escape(short(r["model"])), escape(r["strategy"]), escape(r["block"]), str(r["repeat"] + 1),
         f'<span class="bad">{escape(r["reason"] or "")}</span>']
        for r in study.failed
    ]  # fmt: skip
    return '<h2 id="failed">Failed cells</h2>\n' + _table(
        ["Model", "Strategy", "Block", "Repeat", "Reason"], rows, stack=True
    )


_FIGURE_HEAD = (
    "Model|Condition|Strategy|good req/s|output tok/s|TTFT p50 ms|TTFT p99 ms|TPOT p50 ms|E2E p50 ms|KV peak|"
    "tok/s per MiB|prefix hits|preempted|agreement|KL nats|done"
)


def _all_figures(study: Study, paint: dict[str, str]) -> str:
    head = _FIGURE_HEAD.split("|")
    rows = [
        [
            escape(short(f.condition.model)),
            escape(words.condition(f.condition)),
            _who(f, paint),
            words.spread(f.goodput),
            words.spread(f.output_rate),
            words.milliseconds(f, "ttft", 50.0),
            words.milliseconds(f, "ttft", 99.0),
            words.milliseconds(f, "tpot", 50.0),
            words.milliseconds(f, "e2e", 50.0),
            escape(words.tiers(f.peak_kv)),
            "–" if f.rate_per_mib is None else words.number(f.rate_per_mib),
            words.share(f.hit_ratio),
            str(f.preemptions),
            words.share(f.agreement.value) if f.agreement else "–",
            words.number(f.kl.value) if f.kl else "–",
            f"{f.num_finished}/{f.num_requests}",
        ]
        for f in study.figures
    ]
    return (
        '<h2 id="figures">All figures</h2><details><summary>Every strategy under every condition, with 95 % '
        f"intervals</summary>{_table(head, rows, numeric=range(3, 16))}"
        '<p class="soft small">Requests cut by a cell\'s time limit count with the time they had waited, so their '
        "latencies are at least what is shown.</p></details>"
    )


def _provenance(study: Study) -> str:
    names = (
        "kvwise_version",
        "commit",
        "torch_version",
        "transformers_version",
        "machine",
        "threads",
        "seed",
        "plan_hash",
    )
    pairs = []
    for name in names:
        values = sorted({str(row[name]) for row in study.cells if row[name] is not None})
        pairs.append((name.replace("_", " "), "; ".join(values) or "unknown"))
    times = sorted(row["recorded_at"] for row in study.cells)
    if times:
        pairs.append(("recorded", f"{times[0]} to {times[-1]}"))
    mixed = "; " in dict(pairs)["commit"]
    warning = (
        '<p class="notice">The rows come from several commits: rerun from scratch to compare them.</p>' if mixed else ""
    )
    return f'<footer><h2 id="provenance">Provenance</h2>{warning}{_pairs(pairs)}</footer>'


# -- pieces -----------------------------------------------------------------------------------------------------------


def _who(figures: Figures, paint: dict[str, str]) -> str:
    name = escape(figures.who.label)
    return f'<span class="who" style="--hue:{paint[figures.who.framework]}"><span class="dot"></span>{name}</span>'


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = (), *, stack: bool = False
) -> str:
    """A table that scrolls sideways on a narrow screen; with `stack` each row becomes a card there."""
    right = set(numeric)
    kind = [' class="num"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{escape(name)}</th>" for name, k in zip(head, kind, strict=True))
    body = "\n".join(
        "<tr>" + "".join(_cell(*parts) for parts in zip(row, kind, head, strict=True)) + "</tr>" for row in rows
    )
    style = "scroll stack" if stack else "scroll"
    return f'<div class="{style}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, kind: str, name: str) -> str:
    return f'<td{kind} data-name="{escape(name)}">{text}</td>'


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs) + "</dl>"


def _bullets(items: Sequence[str], none: str) -> str:
    if not items:
        return f"<p>{escape(none)}</p>"
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
