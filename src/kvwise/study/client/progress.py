"""Tells how a load goes: a bar on a terminal, a line now and then in a pipe."""

import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvwise.study.client.answer import Answer

_EVERY_S = 5.0  # between two lines in a pipe
_REDRAW_S = 0.2  # between two pictures of the bar: drawing takes time from what is measured


class PlainWatcher:
    """A line every few seconds, and one at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total = self._ended = self._failed = 0
        self._said = 0.0

    def started(self, total: int) -> None:
        """Say how many."""
        self._total, self._said = total, time.monotonic()
        print(f"{total} requests", file=self._stream, flush=True)

    def ended(self, answer: Answer) -> None:
        """Count, and perhaps say so."""
        self._ended += 1
        self._failed += not answer.ok
        now = time.monotonic()
        if now - self._said >= _EVERY_S or self._ended == self._total:
            self._said = now
            failed = f", {self._failed} failed" if self._failed else ""
            print(f"[{self._ended}/{self._total}]{failed}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left on the screen."""


class BarWatcher:
    """A progress bar."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.description}"),
            console=console, transient=True, auto_refresh=False,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._failed = 0
        self._drawn = 0.0

    def started(self, total: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def ended(self, answer: Answer) -> None:
        """Move on."""
        if self._task is None:
            return
        self._failed += not answer.ok
        text = f"{self._failed} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, description=text)
        if (now := time.monotonic()) - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def make_watcher(stream: TextIO) -> PlainWatcher | BarWatcher:
    """A bar if `stream` is a terminal, else lines."""
    console = Console(file=stream)
    return BarWatcher(console) if console.is_terminal and not console.is_dumb_terminal else PlainWatcher(stream)
