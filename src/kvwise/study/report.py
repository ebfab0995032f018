"""Writes what a reader opens: report.html, one PNG per chart, and each table as one Parquet file."""

import os
from pathlib import Path

from kvwise.study.cells import expand
from kvwise.study.charts import study_charts
from kvwise.study.page import render
from kvwise.study.plan import Plan
from kvwise.study.png import write_png
from kvwise.study.recommend import Verdict, judge
from kvwise.study.record import StudyFolder
from kvwise.study.summary import Study, load_study

REPORT = "report.html"
FIGURES = "figures"


def write_report(folder: StudyFolder, plan: Plan) -> tuple[Study, Verdict, Path]:
    """Build the report of whatever has been measured so far; failed and missing cells are named in it."""
    study = load_study(folder, plan, len(folder.progress(expand(plan)).left))
    verdict = judge(study)
    page = folder.path / REPORT
    draft = page.with_name(f".{REPORT}")
    draft.write_text(render(study, verdict), encoding="utf-8")
    os.replace(draft, page)
    (folder.path / FIGURES).mkdir(exist_ok=True)
    for chart in study_charts(study):
        write_png(chart, folder.path / FIGURES / f"{chart.id}.png")
    folder.merge()
    return study, verdict, page
