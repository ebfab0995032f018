"""A run: every cell recorded, killed and resumed, failures kept with their reason, nothing overwritten."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kvwise.core.errors import PlanError, UsageError
from kvwise.study.cells import CellKind, expand
from kvwise.study.plan import plan_hash
from kvwise.study.record import StudyFolder, set_aside
from kvwise.study.rows import PROVENANCE
from kvwise.study.run import nominal_seconds, run_study
from tests.study.conftest import Silent, make_plan, run_fake
from tests.study.fake import FakeBench

TINY = """
[[block]]
name = "b"
strategies = ["full", "h2o(budget=0.2)"]
models = ["random:3m"]
repeats = 2
context_lengths = [64]
[block.workload]
kind = "random"
[block.load]
max_requests = 4
"""


def rows_of(path: Path, table: str = "cells") -> list[dict]:
    return StudyFolder(path).rows(table)


def test_every_cell_ends_done_or_failed_with_its_reason(finished: Path) -> None:
    cells = {c.id: c for c in expand(make_plan())}
    rows = rows_of(finished)
    assert {r["cell"] for r in rows} == set(cells)
    failed = [r for r in rows if r["status"] == "failed"]
    assert {r["strategy"] for r in failed} == {"hungry"}
    assert all("CapacityError: the pool is too small" in r["reason"] for r in failed)
    assert all(r["wall_s"] > 0 for r in rows if r["kind"] == CellKind.LIVE and r["status"] == "done")


def test_rows_carry_requests_samples_answers_and_provenance(finished: Path) -> None:
    requests = rows_of(finished, "requests")
    done = [r for r in requests if r["finish_reason"] == "length"]
    assert len(done) > 100
    for r in done[:50]:
        assert 0 <= r["ttft_s"] <= r["e2e_s"]
        assert len(r["itl_s"]) == r["output_tokens"] - 1
        assert r["tpot_s"] == pytest.approx(sum(r["itl_s"]) / len(r["itl_s"]))
    assert any(r["cached_tokens"] for r in done if r["strategy"] == "full+prefix")
    assert all(r["did"].get("h2o") for r in done if r["framework"] == "h2o")
    for table in ("cells", "requests", "samples", "answers", "onoff"):
        found = rows_of(finished, table)
        assert found
        assert all(r["plan_hash"] == plan_hash(make_plan()) and r["recorded_at"] for r in found)
        assert set(PROVENANCE) <= set(found[0])


def test_a_killed_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    plan, path = make_plan(TINY), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_fake(plan, path, Silent(stop_after=2))
    before = {r["cell"]: r["recorded_at"] for r in rows_of(path)}
    assert len(before) == 2
    watcher = Silent()
    progress = run_fake(plan, path, watcher)
    assert (len(progress.done), len(progress.left)) == (6, 0)
    assert watcher.recorded == 2
    assert not set(before) & {r.cell.id for r in watcher.results}
    assert run_fake(plan, path, again := Silent()).done == progress.done
    assert again.results == []


def test_a_half_written_cell_is_run_again(tmp_path: Path) -> None:
    plan, path = make_plan(TINY), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_fake(plan, path, Silent(stop_after=1))
    left = StudyFolder(path).progress(expand(plan)).left
    draft = path / "cells" / f".{left[0].id}"
    draft.mkdir()
    (draft / "cells.parquet").write_bytes(b"half a fi")
    assert len(run_fake(plan, path).done) == 6
    assert not draft.exists()


def test_a_cell_during_which_the_process_died_twice_is_given_up(tmp_path: Path) -> None:
    plan, path = make_plan(TINY), tmp_path / "out"
    folder = StudyFolder.create_or_resume(path, plan)
    deadly = expand(plan)[0]
    folder.begin(deadly)
    folder.begin(deadly)
    progress = run_fake(plan, path)
    assert [(c.id, reason) for c, reason in progress.failed] == [
        (deadly.id, "the process died 2 times while this cell ran (out of memory?)")
    ]
    assert len(progress.done) == 5


def test_an_interrupt_does_not_count_as_a_death(tmp_path: Path) -> None:
    plan, path = make_plan(TINY), tmp_path / "out"

    class Interrupting(FakeBench):
        def engine(self, *args: object) -> object:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_fake(plan, path, bench=Interrupting())
    assert len(run_fake(plan, path).done) == 6


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("idle", "IdleMethod: idle did nothing in this cell"),
        ("full+prefix", "IdleMethod: prefix did nothing"),
        ("broken", "MemoryError: no memory for this method"),
    ],
)
def test_a_cell_that_measures_nothing_or_raises_is_recorded_as_failed(
    tmp_path: Path, strategy: str, reason: str
) -> None:
    text = TINY.replace("h2o(budget=0.2)", strategy).replace("repeats = 2", "repeats = 1\nquality = false")
    bench = FakeBench()
    progress = run_fake(make_plan(text), tmp_path / "out", bench=bench)
    ((cell, why),) = progress.failed
    assert cell.strategy == strategy
    assert why.startswith(reason)
    assert len(progress.done) == 1
    assert all(engine.closed for engine in bench.engines)


def test_failed_cells_are_run_again_when_asked(tmp_path: Path) -> None:
    plan = make_plan(TINY.replace("h2o(budget=0.2)", "broken"))
    assert len(run_fake(plan, tmp_path / "out").failed) == 3
    watcher = Silent()
    run_study(plan, tmp_path / "out", FakeBench(), watcher, {"plan_hash": plan_hash(plan)}, retry_failed=True)
    assert len(watcher.results) == 3


def test_the_time_limit_stops_before_a_cell_that_would_pass_it(tmp_path: Path) -> None:
    plan = make_plan("time_limit_s = 3.0\n" + TINY)
    watcher = Silent()
    progress = run_fake(plan, tmp_path / "out", watcher)
    assert watcher.not_started == len(progress.left) > 0
    assert progress.done
    longer = plan.model_copy(update={"time_limit_s": None})
    assert not run_fake(longer, tmp_path / "out").left


def test_the_time_left_falls_to_zero(tmp_path: Path) -> None:
    watcher = Silent()
    run_fake(make_plan(TINY), tmp_path / "out", watcher)
    assert watcher.left[0] > watcher.left[-1] == 0


def test_a_missing_model_or_trace_stops_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model missing"):
        run_fake(make_plan(TINY.replace("random:3m", "missing")), tmp_path / "out")
    text = TINY.replace('kind = "random"', 'kind = "trace"\nfile = "no.jsonl"')
    with pytest.raises(PlanError, match=r"no\.jsonl is no file"):
        run_fake(make_plan(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


QUALITY = """
quality_only = true
[quality]
tasks = ["recall", "counting", "continuation"]
context_lengths = [128]
standard_error = 0.15
protocols = ["multi-turn", "multi-request"]
guides = ["window(budget={budget})"]
guide_budgets = [0.5]
[[block]]
name = "b"
strategies = ["full", "full+prefix", "h2o(budget=0.2)"]
models = ["builtin:recall", "random:3m"]
[block.workload]
kind = "random"
"""


def test_a_quality_cell_leaves_a_row_for_every_answer(tmp_path: Path) -> None:
    progress = run_fake(make_plan(QUALITY), tmp_path / "out")
    assert (len(progress.done), progress.failed, progress.left) == (4 + 3, (), ())
    rows = rows_of(tmp_path / "out", "answers")
    asked = [(r["task"], r["protocol"], r["episode"], r["question"], r["num_tokens"], r["depth"]) for r in rows]
    told = [r for r in rows if r["model"] == "builtin:recall"]
    by_strategy = {s: [a for a, r in zip(asked, rows, strict=True) if r["strategy"] == s and r in told] for s in
                   ("full", "full+prefix", "h2o(budget=0.2)", "window(budget=0.5)")}  # fmt: skip
    assert len(by_strategy["full"]) > 50
    assert all(same == by_strategy["full"] for same in by_strategy.values())
    for r in told:
        assert (r["right"] is None) == (r["task"] == "continuation")
        assert 0 <= r["same_top1"] <= 1 and r["kl_nats"] >= 0 and r["nll_nats"] >= 0 and r["score"] is None
    forced = [r for r in rows if r["model"] == "random:3m"]
    assert len(forced) == 3 * 4
    assert {(r["task"], r["protocol"], r["right"], r["nll_nats"]) for r in forced} == {
        ("agreement", "forced", None, None)
    }
    cells = rows_of(tmp_path / "out")
    assert all(r["kv_bytes_per_token"]["device"] > 0 for r in cells)
    assert all(r["did"].get(r["framework"]) for r in cells if r["framework"] in ("h2o", "window"))


def test_a_killed_exam_goes_on_with_the_same_questions(tmp_path: Path) -> None:
    plan = make_plan(QUALITY)
    with pytest.raises(KeyboardInterrupt):
        run_fake(plan, tmp_path / "out", Silent(stop_after=2))
    run_fake(plan, tmp_path / "out")
    run_fake(plan, tmp_path / "whole")
    drop = ("recorded_at",)
    one, other = ([{k: v for k, v in r.items() if k not in drop} for r in rows_of(tmp_path / name, "answers")] for
                  name in ("out", "whole"))  # fmt: skip
    assert one == other


def test_a_quality_study_goes_on_with_its_traffic(tmp_path: Path) -> None:
    plan = make_plan(QUALITY)
    run_fake(plan, tmp_path / "out")
    watcher = Silent()
    progress = run_fake(plan.model_copy(update={"quality_only": False}), tmp_path / "out", watcher)
    assert watcher.recorded == 7
    assert {r.cell.kind for r in watcher.results} == {CellKind.LIVE}
    assert not progress.left


@pytest.mark.parametrize(
    ("strategy", "fails"), [("idle", True), ("idle(budget=0.5)", True), ("idle(budget=1.0)", False)]
)
def test_an_exam_in_which_a_method_did_nothing_fails_unless_it_kept_all(
    tmp_path: Path, strategy: str, fails: bool
) -> None:
    progress = run_fake(make_plan(QUALITY.replace("h2o(budget=0.2)", strategy)), tmp_path / "out")
    assert [why.partition(":")[0] for _, why in progress.failed] == ["IdleMethod"] * 2 * fails


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[128]", "[16]", r"quality on builtin:recall at context length 16: task 'counting'.*needs at least"),
        ("[128]", "[4090]", r"at context length 4090: recall 0: 4090 tokens of context.*more than the 4096 positions"),
        (
            "[[block]]",
            '[[quality.records]]\nkind = "ruler"\nfile = "no.jsonl"\n[[block]]',
            r"quality.records.*no\.jsonl",
        ),
    ],
)
def test_what_a_model_cannot_be_asked_stops_before_anything_is_written(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        run_fake(make_plan(QUALITY.replace(old, new)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_need_a_model_that_reads_text(tmp_path: Path) -> None:
    file = tmp_path / "niah_single_1.jsonl"
    asked = "Some text. What is the special magic number for it mentioned in the provided text?"
    line = {"index": 0, "input": asked, "answer_prefix": " It is", "outputs": ["7"], "length": 5}
    file.write_text(json.dumps(line) + "\n")
    text = QUALITY.replace("[[block]]", f'[[quality.records]]\nkind = "ruler"\nfile = "{file}"\n[[block]]')
    with pytest.raises(PlanError, match="no model of the plan reads text"):
        run_fake(make_plan(text), tmp_path / "out")


def test_the_length_of_an_exam_is_guessed_from_its_questions() -> None:
    cells = expand(make_plan(QUALITY))
    told, forced = ([c for c in cells if c.model == m] for m in ("builtin:recall", "random:3m"))
    # 3 tasks of 6 episodes under 2 protocols against 4 prompts, by a model that is 11 times as fast.
    assert nominal_seconds(told[0]) - 0.3 == pytest.approx(9 / 11 * (nominal_seconds(forced[0]) - 0.3))
    short = make_plan(QUALITY.replace("standard_error = 0.15", "standard_error = 0.02"))
    assert nominal_seconds(expand(short)[0]) > 5 * nominal_seconds(told[0])


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_an_output_that_is_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    for path, words in ((foreign, "exists and is no study"), (file, "exists and is no folder")):
        with pytest.raises(UsageError, match=words):
            run_fake(make_plan(TINY), path)
    assert snapshot(foreign) == {"thesis.tex": b"years of work"}
    assert file.read_text() == "x"


def test_a_study_of_another_plan_is_refused_and_kept_or_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "out"
    run_fake(make_plan(TINY), path)
    before = snapshot(path)

    other = make_plan("seed = 7\n" + TINY.replace("max_requests = 4", "max_requests = 8"))
    with pytest.raises(UsageError, match="holds a study of another plan"):
        run_fake(other, path)
    assert snapshot(path) == before
    assert set_aside(path, make_plan(TINY)) is None
    moved = set_aside(path, other)
    assert moved == tmp_path / "out.1"
    assert snapshot(moved) == before
    run_fake(other, path)
    run_fake(make_plan(TINY), moved)


def test_two_processes_do_not_write_one_study(tmp_path: Path) -> None:
    plan = make_plan(TINY)
    folder = StudyFolder.create_or_resume(tmp_path / "out", plan)
    with folder.lock(), pytest.raises(UsageError, match="being written by another"):
        run_fake(plan, tmp_path / "out")


def test_a_damaged_file_is_named(copied: Path) -> None:
    file = next((copied / "cells").glob("*/requests.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=file.parent.name):
        StudyFolder(copied).table("requests")


def test_a_later_format_is_refused(copied: Path) -> None:
    marker = json.loads((copied / "study.json").read_text())
    (copied / "study.json").write_text(json.dumps(marker | {"format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        StudyFolder.open(copied)
    with pytest.raises(UsageError, match="format 99"):
        run_fake(make_plan(), copied)
    with pytest.raises(UsageError, match="is no study"):
        StudyFolder.open(copied / "cells")
    assert set_aside(copied, make_plan()) == copied.with_name("out.1")


def test_merged_tables_hold_all_rows(copied: Path) -> None:
    folder = StudyFolder(copied)
    for path in folder.merge():
        assert pq.read_table(path).num_rows == folder.table(path.stem).num_rows


def test_methods_share_traffic_and_memory_is_what_was_asked(finished: Path) -> None:
    rows = [r for r in rows_of(finished) if r["block"] == "memory" and r["status"] == "done"]
    assert {r["pool_bytes"] for r in rows} == {512 * 4096, 64 << 20}
