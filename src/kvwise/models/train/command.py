"""The commands of training: options, progress, and errors in one line."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvwise.core.errors import KvwiseError, UsageError
from kvwise.models.train.finish import finish
from kvwise.models.train.gate import ANSWERS
from kvwise.models.train.loop import State, Trainer, half_is_faster
from kvwise.models.train.recipe import RECIPES

LINE_EVERY_S = 10.0
UNFINISHED = 75  # exit status: stopped before the end, the same command goes on


def train(
    out: Annotated[Path, typer.Argument(help="Folder of the model; a training that is there goes on.")],
    size: Annotated[str, typer.Option(help=f"What to train: {', '.join(RECIPES)}.")] = "small",
    seed: Annotated[int, typer.Option(min=0, help="Draws the weights and the texts.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    time_limit: Annotated[float | None, typer.Option(min=0, help="Minutes; then stop, to go on later.")] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers a cell of the card.")] = ANSWERS,
) -> None:
    """Train a model of the built-in kind from nothing, and write it with its card as a Hugging Face folder.

    Interrupt it at any time: the same command goes on where it was, and ends with the same weights.
    """
    if size not in RECIPES:
        raise UsageError(f"--size {size!r} is no recipe: there are {', '.join(RECIPES)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is not known: cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; cpu always works")
    torch.set_num_threads(threads)
    where = torch.device(device)
    trainer = Trainer(RECIPES[size], seed, out, where, half=half_is_faster(where))
    stop = Stop(time_limit)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.ask)
    if not trainer.run(Lines(trainer), stop):
        typer.echo(f"stopped after {trainer.state.num_tokens:,} tokens; the same command goes on")
        raise typer.Exit(UNFINISHED)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    typer.echo(f"trained in {trainer.state.cpu_s:.0f} CPU-s; measuring every task at every length (* untrained)")
    finish(trainer, out, size, typer.echo, answers)
    typer.echo(f"{out} is complete: see README.md and learning.png there")


class Stop:
    """Whether to stop: a signal came, or the time is over."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._asked = False

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal: the step that runs is ended and saved."""
        self._asked = True

    def __call__(self) -> bool:
        """True once there is a reason."""
        return self._asked or (self._end is not None and time.monotonic() > self._end)


class Lines:
    """A line of progress every ten seconds."""

    def __init__(self, trainer: Trainer) -> None:
        self._recipe = trainer.recipe
        self._first = trainer.state.num_tokens
        self._began = self._said = time.monotonic()

    def __call__(self, state: State, loss: float) -> None:
        """Say where the training is, if it is time to."""
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S:
            return
        self._said = now
        done, whole = state.num_tokens, self._recipe.num_tokens
        left = (whole - done) * (now - self._began) / max(1, done - self._first)
        known = "  ".join(f"{kind} {value:.2f}" for kind, value in sorted(state.known().items()))
        length = self._recipe.stages[state.stage]
        typer.echo(f"{done / whole:4.0%}  {left / 60:4.1f} min left  T={length:<4}  loss {loss:.3f}  {known}")
        sys.stdout.flush()


def run(command: Callable[..., None]) -> int:
    """Run `command` on this process's arguments; its exit status. 2: the caller can mend it."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(standalone_mode=True)
    except KvwiseError as error:
        typer.echo(" ".join(str(error).split()), err=True)
        return 2 if isinstance(error, UsageError) else 1
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0
