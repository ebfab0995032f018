"""The report: one file that needs no network, verdict first, every chart, failures named, also of half a study."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path

import duckdb
import pytest
from rich.console import Console

from kvwise.study.chart import COLOURS, SPARE, Chart, Series, colours, log_ticks, spread_out
from kvwise.study.charts import study_charts
from kvwise.study.compare import change_values, compare
from kvwise.study.page import render
from kvwise.study.palette import Palette
from kvwise.study.plan import Plan
from kvwise.study.recommend import Verdict, judge
from kvwise.study.record import StudyFolder
from kvwise.study.report import write_report
from kvwise.study.summary import Study, load_study
from kvwise.study.table import as_values, print_study
from tests.study.conftest import Silent, make_plan, run_fake
from tests.study.fake import FakeBench


@pytest.fixture(scope="module")
def reported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    path = Path(shutil.copytree(finished, tmp_path_factory.mktemp("report") / "out"))
    write_report(*StudyFolder.open(path))
    return path


@pytest.fixture(scope="module")
def page(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees: no scripts, no styles, no tags."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_the_page_needs_nothing_else(page: str) -> None:
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(v or "" for k, v in attrs if k in ("src", "href", "srcset", "data"))

    Links().feed(page)
    assert found
    assert all(link.startswith("#") for link in found)
    assert page.count("plotly.js v") == 1
    assert "@import" not in page.partition("</style>")[0]


def test_the_verdict_comes_first_and_every_section_follows(page: str) -> None:
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    assert headings == [
        "Verdict: what to run",
        "Throughput against latency",
        "Time to first token",
        "Over the request rate",
        "KV memory over time",
        "Throughput per KV byte",
        "Agreement with the full cache",
        "Over concurrency",
        "Over the KV memory",
        "KV cache on and off",
        "What was held fixed",
        "Failed cells",
        "All figures",
        "Provenance",
    ]
    words = text_of(page)
    assert "run: kvwise generate --model random:13m --strategy" in words
    assert "9.28 s → 3.19 s (2.91×), not reproduced: its setting is unknown" in words
    assert "CapacityError: the pool is too small for one block" in words
    assert "0123456789ab" in words
    assert "The weights are random" in words
    assert "grows with the output" in words


def test_every_chart_is_drawn_once_here_and_once_as_png(page: str, reported: Path) -> None:
    drawn = json.loads(re.search(r'id="charts">(.*?)</', page, re.S)[1])
    places = re.findall(r'class="plot" id="([^"]+)"', page)
    assert sorted(places) == sorted(drawn)
    assert {p.stem for p in (reported / "figures").glob("*.png")} == set(drawn)
    for chart in drawn.values():
        assert chart["data"]
        assert all(len(t["x"]) == len(t["y"]) > 0 for t in chart["data"])


def test_a_framework_has_one_colour_everywhere(reported: Path) -> None:
    study = load_study(*StudyFolder.open(reported))
    paint = Palette(study).colours
    assert len(set(paint.values())) == len(paint)
    for chart in study_charts(study):
        if not chart.id.startswith("onoff"):
            for s in (s for s in chart.series if s.label):
                assert s.colour == paint[s.label.partition(" ")[0]], chart.id


def test_labels_stand_apart_and_near_their_lines(reported: Path) -> None:
    for chart in study_charts(load_study(*StudyFolder.open(reported))):
        low, high = chart.y_range
        heights = [h for _, h in chart.end_labels()]
        assert heights == sorted(heights)
        gaps = [b - a for a, b in pairwise(heights)]
        assert all(gap > 0.05 * (high - low) for gap in gaps), chart.id


def test_spreading_moves_no_label_without_need() -> None:
    assert spread_out([1, 5, 9], 1, 0, 10) == [1, 5, 9]
    assert spread_out([5, 5, 5], 1, 0, 10) == [5, 6, 7]
    assert spread_out([9.5, 9.8, 10], 1, 0, 10) == [8, 9, 10]
    assert spread_out([], 1, 0, 10) == []


def test_unknown_frameworks_get_colours_of_their_own() -> None:
    given = colours(["h2o", "mine", "yours"])
    assert given["h2o"] == COLOURS["h2o"]
    assert given["mine"] == SPARE[0] != given["yours"]


def test_log_axes_have_round_ticks_inside_their_range() -> None:
    assert log_ticks(0.0, 3.0) == (1, 10, 100, 1000)
    assert log_ticks(1.0, 1.4) == (10, 15, 20)
    chart = Chart("a", "b", "c", "", "x", "y", (Series("s", "#000", (1.0,), (50.0,)),), log_y=True, zero=False)
    assert chart.y_range[0] < 1.7 < chart.y_range[1]


def test_a_study_without_any_cell_still_has_a_page(tmp_path: Path) -> None:
    plan = make_plan()
    with pytest.raises(KeyboardInterrupt):
        run_fake(plan, tmp_path / "out", Silent(stop_after=0))
    study, verdict, path = write_report(StudyFolder(tmp_path / "out"), plan)
    words = text_of(path.read_text(encoding="utf-8"))
    assert "nothing to compare" in words
    assert f"{study.num_left} cells of the plan are not measured yet" in words
    assert verdict.decisions == ()


def test_an_unfinished_study_is_reported_with_what_is_left(tmp_path: Path) -> None:
    plan = make_plan()
    with pytest.raises(KeyboardInterrupt):
        run_fake(plan, tmp_path / "out", Silent(stop_after=17))
    study, _, path = write_report(StudyFolder(tmp_path / "out"), plan)
    assert study.figures
    assert "are not measured yet: run the same command to go on" in text_of(path.read_text(encoding="utf-8"))


def test_names_cannot_break_out_of_the_page(opened: tuple[StudyFolder, Plan]) -> None:
    folder, plan = opened
    nasty = plan.model_copy(update={"name": "</script><script>alert(1)</script>"})
    study = load_study(folder, nasty)
    assert "<script>alert(1)" not in render(study, judge(study))


def test_throttled_links_are_labelled_on_page_charts_and_terminal(tmp_path: Path) -> None:
    text = '[links]\n"host:device" = "12GB/s"\n' + make_text(["infinigen(budget=0.2)", "full"])
    plan = make_plan(text)
    run_fake(plan, tmp_path / "out")
    study, verdict, path = write_report(StudyFolder(tmp_path / "out"), plan)
    label = "link host:device: 12 GB/s (throttled)"
    assert f"L{label[1:]}" in text_of(path.read_text(encoding="utf-8"))
    assert all(label in c.note for c in study_charts(study))
    assert label in shown(study, verdict)


def shown(study: Study, verdict: Verdict) -> str:
    """What the terminal shows."""
    stream = StringIO()
    print_study(Console(width=200, file=stream), study, verdict)
    return stream.getvalue()


def make_text(strategies: list[str]) -> str:
    return f"""
[[block]]
name = "b"
strategies = {json.dumps(strategies)}
models = ["random:3m"]
request_rates = [4.0, 16.0]
context_lengths = [64]
quality = false
[block.workload]
kind = "random"
[block.load]
max_requests = 8
"""


def test_the_terminal_shows_the_verdict_last(opened) -> None:
    study = load_study(*opened)
    verdict = judge(study)
    text = shown(study, verdict)
    assert "infinigen 10%" in text
    assert text.index("TTFT p50/p99 ms") < text.index("Verdict") < text.index("run: kvwise generate")


def test_values_are_plain_json(opened) -> None:
    study = load_study(*opened)
    values = json.loads(json.dumps(as_values(study, judge(study)), allow_nan=False))
    assert len(values["figures"]) == len(study.figures)
    assert values["figures"][0]["goodput"].keys() == {"value", "low", "high"}


def test_a_study_compared_with_itself_ties_and_with_a_slower_machine_loses(tmp_path: Path) -> None:
    plan = make_plan(make_text(["full", "streaming(budget=0.2)"]))
    for name, speed in (("fast", 2e-6), ("slow", 2e-5)):
        run_fake(plan, tmp_path / name, bench=FakeBench(speed))
    fast, slow = (load_study(*StudyFolder.open(tmp_path / name)) for name in ("fast", "slow"))
    same = compare(fast, fast)
    assert len(same) == 2 * 2 * 4
    assert all(c.better is None for c in same)
    changes = compare(fast, slow)
    assert {c.better for c in changes if c.figure == "TTFT p50 ms"} == {False}
    assert {c.better for c in compare(slow, fast) if c.figure == "TTFT p50 ms"} == {True}
    assert json.dumps(change_values(changes))


def test_rows_answer_to_sql(reported: Path) -> None:
    query = f"""
        select framework, budget, median(ttft_s) as ttft from '{reported}/requests.parquet'
        where block = 'main' group by all order by ttft
    """
    found = duckdb.sql(query).fetchall()
    assert len(found) == 5
