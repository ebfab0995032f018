"""Runs a plan: cell after cell, each recorded as it ends, failures included."""

import gc
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvwise.core.errors import PlanError, UsageError
from kvwise.models.builtin import BUILTIN
from kvwise.study.asked import check_asked, num_exam_tokens
from kvwise.study.cells import Cell, CellKind, check_strategies, expand
from kvwise.study.face import Bench, ModelFacts
from kvwise.study.loading import loading_seconds, require_length
from kvwise.study.measure import CellRunner
from kvwise.study.plan import Plan, TraceFile
from kvwise.study.record import MAX_DEATHS, SCRATCH, Progress, StudyFolder
from kvwise.study.rows import CellResult, failed
from kvwise.study.workloads import num_requests

# Context tokens per second on one core, questions included: of the built-in model, and of one of a dozen million
# parameters. What larger ones take is learned from their first cell.
EXAM_RATE, EXAM_RATE_OTHERS = 22_000.0, 2_000.0


class Watcher(Protocol):
    """Who is told how the run goes."""

    def started(self, total: int, recorded: int, left_s: float) -> None:
        """The run begins; `recorded` cells were there already."""
        ...

    def began(self, cell: Cell) -> None:
        """A cell begins."""
        ...

    def ended(self, result: CellResult, left_s: float) -> None:
        """A cell ended and is recorded; about `left_s` seconds are left."""
        ...

    def stopped(self, left: int) -> None:
        """The plan's time limit was reached with `left` cells to go."""
        ...


@dataclass(slots=True)
class _Estimate:
    """Guesses how long cells take, from their nominal length and from how the finished ones compared with it."""

    spent: defaultdict[tuple[CellKind, str], float]
    nominal: defaultdict[tuple[CellKind, str], float]

    def learn(self, cell: Cell, wall_s: float) -> None:
        self.spent[self._like(cell)] += wall_s
        self.nominal[self._like(cell)] += nominal_seconds(cell)

    def seconds(self, cell: Cell) -> float:
        known = self.nominal[self._like(cell)]
        return nominal_seconds(cell) * (self.spent[self._like(cell)] / known if known else 1.0)

    def _like(self, cell: Cell) -> tuple[CellKind, str]:
        """Traffic comes at its own pace; an exam takes as long as its model does."""
        return cell.kind, "" if cell.kind is CellKind.LIVE else cell.model


def nominal_seconds(cell: Cell) -> float:
    """What a cell would take on a machine that keeps up, start and warm-up included."""
    if cell.kind is CellKind.ONOFF:
        return 25.0
    if cell.quality is not None:
        rate = EXAM_RATE if cell.model.startswith(BUILTIN) else EXAM_RATE_OTHERS
        return 0.3 + num_exam_tokens(cell.quality, cell.model, cell.context) / rate
    if cell.loading is not None:
        return loading_seconds(cell.loading, cell.context, cell.share)
    if cell.load is None:
        return 1.0
    if cell.rate is None or math.isinf(cell.rate) or isinstance(cell.workload, TraceFile):
        return 0.3 + cell.load.duration_s
    return 0.3 + num_requests(cell.rate, cell.load) / cell.rate


def run_study(
    plan: Plan, path: Path, bench: Bench, watcher: Watcher, provenance: dict[str, Any], *, retry_failed: bool = False
) -> Progress:
    """Run every cell of `plan` that `path` does not hold yet.

    UsageError before anything is written if the plan names what cannot be run or `path` holds something else. A cell
    that raises is recorded as failed. Interrupted at any point, a second call goes on where the first stopped.
    """
    cells = check_plan(plan, bench)
    folder = StudyFolder.create_or_resume(path, plan)
    with folder.lock():
        progress = folder.progress(cells)
        if retry_failed:
            for cell, _ in progress.failed:
                folder.forget(cell)
            progress = folder.progress(cells)
        # Models and libraries stay for good: looking through them again would stall a cell for tenths of a second.
        gc.freeze()
        shutil.rmtree(path / SCRATCH, ignore_errors=True)  # of a run that was killed
        try:
            _run_all(plan, folder, list(progress.left), len(cells), CellRunner(plan, bench), watcher, provenance)
        finally:
            gc.unfreeze()
            shutil.rmtree(path / SCRATCH, ignore_errors=True)
        return folder.progress(cells)


def check_plan(plan: Plan, bench: Bench) -> list[Cell]:
    """The plan's cells, after its strategies, models and files proved usable."""
    check_strategies(plan, bench.check_strategy)
    cells = expand(plan)
    for block in plan.block:
        source = getattr(block.workload, "file", None)
        if source is not None and not Path(source).is_file():
            raise PlanError(f"block {block.name!r}: {source} is no file; give the path of the trace or CSV file")
    for text, placement in dict.fromkeys((c.strategy, c.placement) for c in cells if c.kind is CellKind.LIVE):
        bench.check_placement(text, placement)
    facts: dict[str, ModelFacts] = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        # Only what the user can mend stops the study here; a model too large for the machine is a failed cell.
        try:
            facts[model] = bench.facts(model)
        except UsageError:
            raise
        except Exception:
            continue
    check_asked(plan, cells, facts)
    for cell in cells:
        if cell.loading is not None and cell.model in facts:
            require_length(cell, facts[cell.model])
    return cells


def _run_all(
    plan: Plan,
    folder: StudyFolder,
    left: list[Cell],
    total: int,
    runner: CellRunner,
    watcher: Watcher,
    provenance: dict[str, Any],
) -> None:
    estimate = _Estimate(defaultdict(float), defaultdict(float))
    clock = runner.clock
    start = clock.now()
    watcher.started(total, total - len(left), sum(map(estimate.seconds, left)))
    for index, cell in enumerate(left):
        over = plan.time_limit_s is not None and clock.now() - start + estimate.seconds(cell) > plan.time_limit_s
        if over:
            watcher.stopped(len(left) - index)
            return
        watcher.began(cell)
        began = clock.now()
        result = _run_one(folder, cell, runner)
        folder.save(result, provenance)
        estimate.learn(cell, clock.now() - began)
        watcher.ended(result, sum(map(estimate.seconds, left[index + 1 :])))


def _run_one(folder: StudyFolder, cell: Cell, runner: CellRunner) -> CellResult:
    deaths = folder.deaths(cell)
    if deaths >= MAX_DEATHS:
        return failed(cell, f"the process died {deaths} times while this cell ran (out of memory?)", 0.0)
    folder.begin(cell)
    began = runner.clock.now()
    try:
        return runner.run(cell)
    except KeyboardInterrupt:
        folder.give_up(cell)
        raise
    except Exception as error:
        result = failed(cell, reason_of(error), runner.clock.now() - began)
    gc.collect()  # what failed may hold a pool in a cycle of references: it must be gone before the next cell
    return result


def reason_of(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:400]}"
