"""The report: one HTML file that needs nothing else. The verdict first, then the charts, then how it was measured."""

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import pairwise

from plotly.offline import get_plotlyjs

from kvwise.study import words
from kvwise.study.chart import Chart
from kvwise.study.charts import onoff_times, study_charts
from kvwise.study.fixed import held_fixed
from kvwise.study.loading_charts import LOADING
from kvwise.study.loading_page import loading_section
from kvwise.study.markup import pairs, table, who
from kvwise.study.palette import Palette, short, slug
from kvwise.study.plotly_chart import plotly_chart
from kvwise.study.quality_looks import AGREEMENT, QUALITY, section_of
from kvwise.study.quality_page import quality_section
from kvwise.study.recommend import Verdict
from kvwise.study.summary import Study
from kvwise.study.verdict_page import verdict_section


def render(study: Study, verdict: Verdict) -> str:
    """The whole page as text."""
    charts = study_charts(study)
    paint = Palette(study).colours
    sections = sections_of(study, charts)
    body = [
        _head(study, sections),
        verdict_section(study, verdict, paint),
        *(_section(name, [c for c in charts if c.section == name], study, paint) for name in sections),
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


def sections_of(study: Study, charts: Sequence[Chart]) -> list[str]:
    """The sections in the charts' order; those of quality also where there are figures and no chart."""
    names = dict.fromkeys(section_of(q.basis) for q in study.qualities)
    first = [QUALITY] if QUALITY in names else []
    loading = [LOADING] if study.loading else []
    return list(dict.fromkeys([*first, *(chart.section for chart in charts), *names, *loading]))


def _head(study: Study, sections: Sequence[str]) -> str:
    cells = len(study.cells) - len(study.failed)
    models = ", ".join(dict.fromkeys(short(row["model"]) for row in study.cells))
    links = [("Verdict", "verdict"), *((name, slug(name)) for name in sections), ("Held fixed", "fixed")]
    notices = [f"Link {escape(f'{name}: {text}')}." for name, text in sorted(study.links.items())]
    if study.num_left:
        notices.append(f"{study.num_left} cells of the plan are not measured yet: run the same command to go on.")
    if study.failed:
        cell = "cell" if len(study.failed) == 1 else "cells"
        notices.append(f'{len(study.failed)} {cell} failed: <a href="#failed">which and why</a>.')
    return "\n".join(
        [
            f"<h1>KV cache study: {escape(study.name)}</h1>",
            f'<p class="lead">{cells} cells measured on one engine, on {escape(models or "no model yet")}; strategies '
            "differ, all else is the same.</p>",
            "<nav>" + "".join(f'<a href="#{target}">{escape(name)}</a>' for name, target in links) + "</nav>",
            *(f'<p class="notice">{text}</p>' for text in notices),
        ]
    )


# -- sections ---------------------------------------------------------------------------------------------------------


def _section(name: str, charts: Sequence[Chart], study: Study, paint: dict[str, str]) -> str:
    extra = _onoff_table(study) if any(chart.id.startswith("onoff") for chart in charts) else ""
    if name in (QUALITY, AGREEMENT):
        extra = quality_section(study, name, paint)
    if name == LOADING:
        extra = loading_section(study)
    groups = "\n".join(
        _group(name, [c for c in charts if c.group == name]) for name in dict.fromkeys(c.group for c in charts)
    )
    return f'<h2 id="{slug(name)}">{escape(name)}</h2>\n{extra}{groups}'


def _group(name: str, charts: Sequence[Chart]) -> str:
    """Charts that stand together under a heading; those that are folded behind it."""
    heading = f"<h3>{escape(name)}</h3>" if name else ""
    shown, folded = _grid([c for c in charts if not c.folded]), _grid([c for c in charts if c.folded])
    more = f"<details><summary>{escape(name.capitalize())}, task by task</summary>{folded}</details>" if folded else ""
    return heading + shown + more


def _grid(charts: Sequence[Chart]) -> str:
    figures = "\n".join(
        f"<figure><h3>{escape(c.title)}</h3><figcaption>{escape(c.note)}</figcaption>"
        f'<div class="plot" id="{c.id}" role="img" aria-label="{escape(f"{c.section}: {c.heading}")}"></div></figure>'
        for c in charts
    )
    return f'<div class="grid">\n{figures}\n</div>' if charts else ""


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
        + table(head, rows, numeric=range(6))
    )


def _fixed(study: Study) -> str:
    return '<h2 id="fixed">What was held fixed</h2>\n' + pairs(held_fixed(study))


def _failed(study: Study) -> str:
    if not study.failed:
        return '<h2 id="failed">Failed cells</h2><p>None.</p>'
    rows = [
        [escape(short(r["model"])), escape(r["strategy"]), escape(r["block"]), str(r["repeat"] + 1),
         f'<span class="bad">{escape(r["reason"] or "")}</span>']
        for r in study.failed
    ]  # fmt: skip
    return '<h2 id="failed">Failed cells</h2>\n' + table(
        ["Model", "Strategy", "Block", "Repeat", "Reason"], rows, stack=True
    )


_FIGURE_HEAD = (
    "Model|Condition|Strategy|good req/s|output tok/s|TTFT p50 ms|TTFT p99 ms|TPOT p50 ms|E2E p50 ms|KV peak|"
    "tok/s per MiB|prefix hits|preempted|quality|KL nats|done"
)


def _all_figures(study: Study, paint: dict[str, str]) -> str:
    if not study.figures:
        return ""
    head = _FIGURE_HEAD.split("|")
    rows = [
        [
            escape(short(f.condition.model)),
            escape(words.condition(f.condition)),
            who(f.who, paint),
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
            words.score(f.quality),
            "–" if f.quality is None or f.quality.kl is None else words.number(f.quality.kl.value),
            f"{f.num_finished}/{f.num_requests}",
        ]
        for f in study.figures
    ]
    return (
        '<h2 id="figures">All figures</h2><details><summary>Every strategy under every condition, with 95 % '
        f"intervals</summary>{table(head, rows, numeric=range(3, 16))}"
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
    given = []
    for name in names:
        values = sorted({str(row[name]) for row in study.cells if row[name] is not None})
        given.append((name.replace("_", " "), "; ".join(values) or "unknown"))
    times = sorted(row["recorded_at"] for row in study.cells)
    if times:
        given.append(("recorded", f"{times[0]} to {times[-1]}"))
    mixed = "; " in dict(given)["commit"]
    warning = (
        '<p class="notice">The rows come from several commits: rerun from scratch to compare them.</p>' if mixed else ""
    )
    return f'<footer><h2 id="provenance">Provenance</h2>{warning}{pairs(given)}</footer>'
