"""Loading in tables and sentences, the same on the page and on the terminal."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvwise.study import words
from kvwise.study.loading_figures import LoadingFigures, Mean, cake_of, mean_speedups
from kvwise.study.loading_section import COMPUTE, LOAD
from kvwise.study.markup import bullets, table
from kvwise.study.palette import short
from kvwise.study.papers import compare_paper
from kvwise.study.plan import Plan
from kvwise.study.summary import Study

PAPER_MEAN = "the paper's 2.6× (Cake, arXiv 2410.03065)"
HEAD = ("place", "share", "link", "compute ms", "load ms", "best ms", "method", "TTFT ms", "vs load",
        "vs compute", "/ best", "loaded", "decided", "regret ms")  # fmt: skip
FIXED = HEAD[:6]
NUMERIC = (1, 3, 4, 5, 7, 8, 9, 10, 11, 13)
SPEED_UPS = (
    "Speed-ups of the time to the first token, against loading only \\ computing only. Red: more than a chunk behind."
)
PAPER_HEAD = ("where", "what", "paper", "here")


def loading_rows(figures: Sequence[LoadingFigures]) -> Iterator[list[str]]:
    """A row for each method but the two fixed choices, at each place."""
    for f in figures:
        place, load = f.place, f.methods.get(LOAD)
        beside = f" + {place.num_others} short" if place.num_others else ""
        told = [
            f"{place.block}: {short(place.model)}, {place.context}{beside}",
            f"{place.share * 100:g} %",
            f"{words.number(f.bytes_per_s / 1e6)} MB/s ({place.bandwidth})",
            _ms(f.methods[COMPUTE].ttft.value),
            "–" if load is None else _ms(load.ttft.value),
            "–" if f.optimum is None else _ms(f.optimum.value),
        ]
        for name, method in f.methods.items():
            if name in (COMPUTE, LOAD):
                continue
            decided = ", ".join(f"{count} {name}" for name, count in sorted(method.decisions.items()))
            yield [
                *told,
                name,
                _ms(method.ttft.value),
                _times(f.speedup(name, LOAD)),
                _times(f.speedup(name, COMPUTE)),
                _times(f.over_optimum(name)),
                words.share(method.loaded),
                decided or "–",
                "–" if method.regret is None else _ms(method.regret),
            ]


def loading_sentences(figures: Sequence[LoadingFigures]) -> list[str]:
    """What the figures say of Cake: mean speed-ups beside the paper's, and how often it stayed near the optimum."""
    alone = [f for f in figures if cake_of(f) is not None and not f.place.num_others and f.optimum is not None]
    found = mean_speedups(alone)
    if found is None:
        return []
    names = [(f, cake_of(f) or "") for f in alone]
    near, better = sum(f.near_optimum(n) for f, n in names), sum(f.near_better(n) for f, n in names)
    count = f"{found.num} place{'' if found.num == 1 else 's'}"
    return [
        f"Cake over {count}: {found.over_load:.2f}× sooner than loading only, {found.over_compute:.2f}× sooner than "
        f"computing only, {_both(found):.2f}× on average; beside it, {PAPER_MEAN}",
        f"at most 1.10 × Tc·Tl/(Tc+Tl) and one chunk at {near} of {found.num}; at most one chunk behind the better of "
        f"computing and loading at {better} of {found.num}",
    ]


def _both(found: Mean) -> float:
    return (found.over_load + found.over_compute) / 2


def _ms(seconds: float) -> str:
    return words.number(seconds * 1e3)


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


# -- page -------------------------------------------------------------------------------------------------------------


def loading_section(study: Study) -> str:
    """What stands above the charts: sentences, the paper's figures beside ours, and all places in a table."""
    parts = [bullets([f"{text}." for text in loading_sentences(study.loading)])]
    compared = compare_paper(study.plan.paper, study.loading)
    if compared is not None:
        paper, rows = compared
        cells = [[escape(r.where), escape(r.what), escape(r.paper), _marked(r.ours, r.losing)] for r in rows]
        parts += [
            f"<h3>Beside {escape(paper.title)}</h3>",
            f'<p class="soft small">{escape(SPEED_UPS)}</p>',
            table(PAPER_HEAD, cells, stack=True),
            '<p class="soft small">What differs:</p>',
            bullets(paper.differs),
        ]  # fmt: skip
    rows_html = [[escape(cell) for cell in row] for row in loading_rows(study.loading)]
    if rows_html:
        parts.append("<details><summary>Every place</summary>" + table(HEAD, rows_html, numeric=NUMERIC) + "</details>")
    return "\n".join(filter(None, parts))


def _marked(text: str, losing: bool) -> str:
    return f'<span class="bad">{escape(text)}</span>' if losing else escape(text)


# -- terminal ---------------------------------------------------------------------------------------------------------


def loading_tables(study: Study) -> RenderableType:
    """The same for the terminal."""
    parts: list[RenderableType] = [Text("\nLoading: time to the first token", style="bold")]
    shown = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for i, name in enumerate(HEAD):
        shown.add_column(name, justify="right" if i in NUMERIC else "left", no_wrap=i < len(FIXED))
    before: list[str] = []
    for row in loading_rows(study.loading):
        same = row[: len(FIXED)] == before
        before = row[: len(FIXED)]
        shown.add_row(*([""] * len(FIXED) if same else before), *row[len(FIXED) :])
    if shown.row_count:
        parts.append(shown)
    parts += [Text(f"  {sentence}") for sentence in loading_sentences(study.loading)]
    compared = compare_paper(study.plan.paper, study.loading)
    if compared is not None:
        paper, rows = compared
        beside = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for name in PAPER_HEAD:
            beside.add_column(name)
        for r in rows:
            beside.add_row(r.where, r.what, r.paper, Text(r.ours, style="red" if r.losing else ""))
        parts += [Text(f"\nBeside {paper.title}", style="bold"),
                  Text(SPEED_UPS, style="dim"),
                  beside, Text("what differs:", style="dim"),
                  *(Text(f"  {difference}", style="dim") for difference in paper.differs)]  # fmt: skip
    return Group(*parts)


def loading_values(study: Study, plan: Plan) -> dict[str, Any]:
    """The same as JSON values; seconds and bytes per second."""
    compared = compare_paper(plan.paper, study.loading)
    out: dict[str, Any] = {
        "loading": [
            {
                "block": f.place.block,
                "model": f.place.model,
                "context": f.place.context,
                "compute_share": f.place.share,
                "bandwidth": f.place.bandwidth,
                "bytes_per_s": f.bytes_per_s,
                "num_others": f.place.num_others,
                "optimum_s": None if f.optimum is None else f.optimum.value,
                "chunk_s": f.chunk_s,
                "ttft_s": {name: method.ttft.value for name, method in f.methods.items()},
                "all_first_s": {name: method.all_first.value for name, method in f.methods.items()},
                "regret_s": {name: method.regret for name, method in f.methods.items()},
            }
            for f in study.loading
        ],
        "loading_findings": loading_sentences(study.loading),
    }
    if compared is not None:
        paper, rows = compared
        beside = [{"where": r.where, "what": r.what, "paper": r.paper, "here": r.ours} for r in rows]
        out["paper"] = {"title": paper.title, "figures": beside, "differs": list(paper.differs)}
    return out
