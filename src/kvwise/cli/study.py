"""`kvwise study`: plan, run, status, report, compare; on its own it runs the default plan."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvwise.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kvwise.study.plan import Plan
    from kvwise.study.record import StudyFolder

app = typer.Typer(
    name="study",
    help="Measure strategies side by side and say what to run. Without a command: run the default plan.",
    invoke_without_command=True,
    no_args_is_help=False,
)

DEFAULT_OUTPUT = "study-out"
PIPE_WIDTH = 160  # columns of a table that goes to a file or pipe

Change = "Change the plan (each option replaces one axis or setting in all blocks)"
Output = Annotated[
    Path, typer.Option("--output", "--out", "-o", help="Folder for rows and report; resumed if it is there.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Aside = Annotated[
    bool,
    typer.Option("--overwrite-own", help="If the folder holds a study of another plan, rename that and start afresh."),
]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")]
Model = Annotated[list[str] | None, typer.Option(help="Repeat for several.", rich_help_panel=Change)]
StrategyText = Annotated[
    list[str] | None, typer.Option("--strategy", help="May hold {budget}; repeat for several.", rich_help_panel=Change)
]
Budget = Annotated[list[float] | None, typer.Option(help="Fills {budget}.", rich_help_panel=Change)]
Rate = Annotated[
    list[str] | None,
    typer.Option("--request-rate", help="Requests per second, inf, or trace.", rich_help_panel=Change),
]
Concurrency = Annotated[
    list[str] | None, typer.Option("--max-concurrency", help="Or unlimited.", rich_help_panel=Change)
]
Context = Annotated[list[int] | None, typer.Option("--context-length", help="Tokens.", rich_help_panel=Change)]
Memory = Annotated[
    list[str] | None,
    typer.Option("--kv-cache-memory-bytes", help="auto, 512MiB, or '4096 tokens'.", rich_help_panel=Change),
]
Repeats = Annotated[int | None, typer.Option(rich_help_panel=Change)]
NumPrompts = Annotated[int | None, typer.Option(help="Requests per cell.", rich_help_panel=Change)]
Burstiness = Annotated[float | None, typer.Option(help="1: Poisson; below: bursts.", rich_help_panel=Change)]
Goodput = Annotated[
    list[str] | None, typer.Option(help="Service levels: ttft:500 tpot:50 (ms).", rich_help_panel=Change)
]
Floor = Annotated[
    float | None,
    typer.Option("--min-quality", help="Let no strategy win whose quality is below, 0 to 1.", rich_help_panel=Change),
]
Task = Annotated[list[str] | None, typer.Option(help="What is asked: recall, ...; repeat.", rich_help_panel=Change)]
Protocol = Annotated[list[str] | None, typer.Option(help="multi-turn, multi-request.", rich_help_panel=Change)]
QualityOnly = Annotated[
    bool, typer.Option("--quality-only", help="Measure answers only, no traffic; without a plan: the quality plan.")
]
Paper = Annotated[
    str | None, typer.Option("--paper", help="Run a paper's tables and print its figures beside: 2410.03065 (Cake).")
]
Named = Annotated[
    str | None, typer.Option("--plan", metavar="NAME", help="A built-in plan: default, quality, methods, 2410.03065.")
]
Tiers = Annotated[
    list[str] | None,
    typer.Option("--tiers", help="Below the device: 'host(size=1GiB)', several by ' + ', or none.",
                 rich_help_panel=Change),
]  # fmt: skip
Lifetime = Annotated[
    list[str] | None, typer.Option("--ttl", help="Seconds that KV is kept, or never.", rich_help_panel=Change)
]
IdleLifetime = Annotated[
    list[str] | None, typer.Option("--idle-ttl", help="Likewise, without being used.", rich_help_panel=Change)
]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds for this run.", rich_help_panel=Change)]
Seed = Annotated[int | None, typer.Option(rich_help_panel=Change)]
Dtype = Annotated[str | None, typer.Option(rich_help_panel=Change)]
Link = Annotated[list[str] | None, typer.Option(help="Throttle: host:device=12GB/s.", rich_help_panel=Change)]
Trace = Annotated[str | None, typer.Option(help="Replay a Mooncake JSONL or CSV file.", rich_help_panel=Change)]
TraceBlock = Annotated[int | None, typer.Option(help="Tokens per hash id.", rich_help_panel=Change)]
LengthScale = Annotated[float | None, typer.Option(help="Times the trace's lengths.", rich_help_panel=Change)]
TimeScale = Annotated[float | None, typer.Option(help="Times the trace's times.", rich_help_panel=Change)]
Block = Annotated[list[str] | None, typer.Option(help="Only this block of the plan.", rich_help_panel=Change)]


@app.callback()
def study(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "--out", "-o", help="Folder for rows and report.")] = None,
    as_json: Json = False,
    overwrite_own: Aside = False,
    named: Named = None,
    quality_only: QualityOnly = False,
    paper: Paper = None,
) -> None:
    """Measure strategies side by side and say what to run. Without a command: run the default plan."""
    if context.invoked_subcommand is None:
        folder = Path(DEFAULT_OUTPUT) if output is None else output
        chosen = _read(_Choice(None, named, paper, quality_only))
        _run(chosen, folder, as_json=as_json, overwrite_own=overwrite_own, retry_failed=False)
        return
    options = ("output", "as_json", "overwrite_own", "named", "quality_only", "paper")
    given = [context.get_parameter_source(option) for option in options]
    if any(source is not None and source.name == "COMMANDLINE" for source in given):
        name = context.invoked_subcommand
        raise UsageError(f"options go behind the command: kvwise study {name} ... (see kvwise study {name} --help)")


@app.command()
def run(
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.toml]", help="Default: the built-in plan.")] = None,
    output: Output = Path(DEFAULT_OUTPUT),
    as_json: Json = False,
    overwrite_own: Aside = False,
    retry_failed: Retry = False,
    named: Named = None,
    quality_only: QualityOnly = False,
    paper: Paper = None,
    model: Model = None,
    strategy: StrategyText = None,
    budget: Budget = None,
    request_rate: Rate = None,
    max_concurrency: Concurrency = None,
    context_length: Context = None,
    memory: Memory = None,
    tiers: Tiers = None,
    ttl: Lifetime = None,
    idle_ttl: IdleLifetime = None,
    repeats: Repeats = None,
    num_prompts: NumPrompts = None,
    burstiness: Burstiness = None,
    goodput: Goodput = None,
    min_quality: Floor = None,
    task: Task = None,
    protocol: Protocol = None,
    time_limit: TimeLimit = None,
    seed: Seed = None,
    dtype: Dtype = None,
    link: Link = None,
    trace: Trace = None,
    trace_block_size: TraceBlock = None,
    length_scale: LengthScale = None,
    time_scale: TimeScale = None,
    block: Block = None,
) -> None:
    """Run a plan, or go on with one that was stopped; then write the report."""
    from kvwise.study.overrides import Overrides

    changes = Overrides(
        model=model or (), strategy=strategy or (), budget=budget or (), request_rate=request_rate or (),
        max_concurrency=max_concurrency or (), context_length=context_length or (), memory=memory or (),
        tiers=tiers or (), ttl=ttl or (), idle_ttl=idle_ttl or (),
        repeats=repeats, num_prompts=num_prompts, burstiness=burstiness, goodput=goodput or (),
        min_quality=min_quality, time_limit=time_limit, seed=seed, dtype=dtype, link=link or (),
        trace=trace, trace_block_size=trace_block_size, length_scale=length_scale, time_scale=time_scale,
        block=block or (), task=task or (), protocol=protocol or (),
    )  # fmt: skip
    chosen = changes.apply(_read(_Choice(plan_file, named, paper, quality_only)))
    _run(chosen, output, as_json=as_json, overwrite_own=overwrite_own, retry_failed=retry_failed)


@app.command()
def plan(
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.toml]", help="Default: the built-in plan.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
    named: Named = None,
    quality_only: QualityOnly = False,
    paper: Paper = None,
) -> None:
    """Print a plan as TOML on standard output, and how many cells it has on standard error."""
    from kvwise.study.built_in import built_in_plan, built_in_text
    from kvwise.study.cells import check_strategies, expand
    from kvwise.study.plan import plan_hash
    from kvwise.study.progress import clock_time
    from kvwise.study.run import nominal_seconds
    from kvwise.study.toml import to_toml

    choice = _Choice(plan_file, named, paper, quality_only)
    chosen = _read(choice)
    check_strategies(chosen, partial(_parse, methods=chosen.methods))
    cells = expand(chosen)
    if as_json:
        facts = [
            {"id": c.id, "kind": c.kind.value, "model": c.model, "strategy": c.strategy, "what": c.describe()}
            for c in cells
        ]
        typer.echo(json.dumps({"plan": chosen.name, "hash": plan_hash(chosen), "cells": facts}, indent=1))
        return
    as_it_is = plan_file is None and chosen.quality_only == built_in_plan(choice.name).quality_only
    typer.echo(built_in_text(choice.name) if as_it_is else to_toml(chosen), nl=False)
    seconds = clock_time(sum(map(nominal_seconds, cells)))
    typer.echo(f"{len(cells)} cells, at least {seconds}, hash {plan_hash(chosen)}", err=True)


@app.command()
def status(folder: Annotated[Path, typer.Argument(metavar="FOLDER")], as_json: Json = False) -> None:
    """Show how many cells of a study are done, failed and left."""
    from kvwise.study.cells import expand

    opened, chosen = _open(folder)
    progress = opened.progress(expand(chosen))
    failed = [{"cell": cell.describe(), "reason": reason} for cell, reason in progress.failed]
    if as_json:
        counts = {"done": len(progress.done), "failed": failed, "left": len(progress.left)}
        typer.echo(json.dumps({"study": chosen.name} | counts, indent=1))
        return
    typer.echo(f"{chosen.name}: {len(progress.done)} done, {len(failed)} failed, {len(progress.left)} left")
    for entry in failed:
        typer.echo(f"failed: {entry['cell']}: {entry['reason']}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    as_json: Json = False,
    goodput: Goodput = None,
    min_quality: Floor = None,
) -> None:
    """Write the report of a study again, also of one that is not finished, perhaps with other service levels."""
    from kvwise.study.overrides import Overrides

    opened, chosen = _open(folder)
    _report(opened, Overrides(goodput=goodput or (), min_quality=min_quality).apply(chosen), as_json=as_json)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A")],
    after: Annotated[Path, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """Compare two studies: each figure that both have, and whether it moved by more than the noise."""
    from kvwise.study.compare import change_table, change_values
    from kvwise.study.compare import compare as compare_studies
    from kvwise.study.summary import load_study

    changes = compare_studies(*(load_study(*_open(folder)) for folder in (before, after)))
    if not changes:
        raise UsageError(f"{before} and {after} have no strategy and condition in common; nothing to compare")
    if as_json:
        typer.echo(json.dumps(change_values(changes), indent=1))
        return
    _console().print(change_table(changes, (str(before), str(after))))


def _run(plan: "Plan", output: Path, *, as_json: bool, overwrite_own: bool, retry_failed: bool) -> None:
    from kvwise.study.plan import plan_hash
    from kvwise.study.progress import make_watcher
    from kvwise.study.provenance import provenance
    from kvwise.study.record import SCRATCH, StudyFolder, set_aside
    from kvwise.study.run import run_study
    from kvwise.study.workbench import Workbench, num_threads

    # What cannot be written to is refused before models are loaded.
    if overwrite_own:
        moved = set_aside(output, plan)
        if moved is not None:
            typer.echo(f"{output} held a study of another plan; it is now {moved}", err=True)
    StudyFolder(output).refuse_other(plan)
    bench = Workbench(plan, output / SCRATCH)
    facts = provenance(seed=plan.seed, threads=num_threads(), plan_hash=plan_hash(plan))
    watcher, bar = make_watcher(sys.stderr)
    try:
        run_study(plan, output, bench, watcher, facts, retry_failed=retry_failed)
    finally:
        if bar is not None:
            bar.close()
    _report(StudyFolder(output), plan, as_json=as_json)


def _report(folder: "StudyFolder", plan: "Plan", *, as_json: bool) -> None:
    from kvwise.study.report import write_report
    from kvwise.study.table import as_values, print_study

    study, verdict, page = write_report(folder, plan)
    if as_json:
        typer.echo(json.dumps(as_values(study, verdict), indent=1))
    else:
        print_study(_console(), study, verdict)
    typer.echo(f"report: {page}", err=True)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def _open(folder: Path) -> "tuple[StudyFolder, Plan]":
    from kvwise.study.record import StudyFolder

    return StudyFolder.open(folder)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which plan: a file, a built-in one by name, or a paper's; `quality_only`: without its traffic."""

    file: Path | None
    named: str | None
    paper: str | None
    quality_only: bool

    @property
    def name(self) -> str:
        """The built-in plan that is meant where no file is given."""
        return self.named or self.paper or ("quality" if self.quality_only else "default")


def _read(choice: _Choice) -> "Plan":
    """The chosen plan; UsageError if two are."""
    from kvwise.study.built_in import built_in_plan, paper_plan
    from kvwise.study.plan import read_plan

    others = [str(choice.file)] if choice.file is not None else []
    if choice.named is not None:
        others += [] if choice.paper is None else [f"--paper {choice.paper}"]
        if others:
            raise UsageError(f"--plan {choice.named} is a plan of its own: leave out {others[0]}")
    if choice.paper is not None:
        others += ["--quality-only"] if choice.quality_only else []
        if others:
            raise UsageError(f"--paper {choice.paper} is a plan of its own: leave out {others[0]}")
        return paper_plan(choice.paper)
    plan = built_in_plan(choice.name) if choice.file is None else read_plan(choice.file)
    return plan.model_copy(update={"quality_only": True}) if choice.quality_only else plan


def _parse(text: str, methods: Sequence[str]) -> object:
    from kvwise.methods.catalogue import catalogue, parse

    return parse(text, catalogue().reading(*methods))
