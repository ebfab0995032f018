"""Tells how a run goes: a bar with the time left on a terminal, plain lines in a pipe."""

import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from kvwise.study.cells import Cell
from kvwise.study.rows import CellResult, Status
from kvwise.study.run import Watcher


def clock_time(seconds: float) -> str:
    """Seconds as `4:05` or `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainWatcher:
    """One line per cell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = 0
        self._ended = 0

    def started(self, total: int, recorded: int, left_s: float) -> None:
        """Say how much there is to do."""
        self._total, self._ended = total, recorded
        resumed = f", {recorded} of them recorded before" if recorded else ""
        self._say(f"{total} cells{resumed}, about {clock_time(left_s)}")

    def began(self, cell: Cell) -> None:
        """Nothing: the line comes when the cell ends."""

    def ended(self, result: CellResult, left_s: float) -> None:
        """Say how the cell ended."""
        self._ended += 1
        how = "done" if result.status is Status.DONE else f"FAILED {result.reason}"
        self._say(f"[{self._ended}/{self._total}] {result.cell.describe()}: {how}, about {clock_time(left_s)} left")

    def stopped(self, left: int) -> None:
        """Say that the time limit was reached."""
        self._say(f"time limit of the plan reached with {left} cells to go; the same command goes on")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarWatcher:
    """A progress bar; failures stay above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("[dim]{task.description}"),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that redraws would take time from what is being measured
        )
        self._task: TaskID | None = None

    def started(self, total: int, recorded: int, left_s: float) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("", total=total, completed=recorded, left=clock_time(left_s))
        self._bar.start()

    def began(self, cell: Cell) -> None:
        """Show which cell runs."""
        if self._task is not None:
            self._bar.update(self._task, description=escape(cell.describe()), refresh=True)

    def ended(self, result: CellResult, left_s: float) -> None:
        """Move on."""
        if result.status is Status.FAILED:
            self._console.print(f"[red]failed[/] {escape(result.cell.describe())}: {escape(result.reason or '')}")
        if self._task is not None:
            self._bar.update(self._task, advance=1, left=clock_time(left_s), refresh=True)

    def stopped(self, left: int) -> None:
        """Say that the time limit was reached."""
        self._console.print(f"time limit of the plan reached with {left} cells to go; the same command goes on")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def make_watcher(stream: TextIO = sys.stderr) -> tuple[Watcher, BarWatcher | None]:
    """A bar if `stream` is a terminal, else lines; the bar again, to be closed."""
    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainWatcher(stream), None
    bar = BarWatcher(console)
    return bar, bar
