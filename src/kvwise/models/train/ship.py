"""`python -m kvwise.models.train.ship FOLDER`: make a finished training the model that comes with the package."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvwise.core.errors import UsageError
from kvwise.models.builtin import FOLDER
from kvwise.models.checksums import FILE, verify
from kvwise.models.train.gate import check

SHIPPED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    "learning.png",
    "README.md",
    FILE,
)
ADDED = ("less.safetensors",)  # what methods have learned about the model, once it was trained: kvwise train


def ship(
    folder: Annotated[Path, typer.Argument(help="A finished training.")],
    to: Annotated[Path, typer.Option(help="Folder to ship it to.")] = FOLDER / "recall",
    answers: Annotated[int, typer.Option(min=20, help="Answers a cell of the gate.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 2,
) -> None:
    """Check a finished training against its card on new questions, and copy what is shipped of it.

    Refused: a file that is not what its checksum says, weights over 10 MB, accuracies below the card.
    """
    torch.set_num_threads(threads)
    if missing := [name for name in SHIPPED if not (folder / name).is_file()]:
        raise UsageError(f"{folder} lacks {', '.join(missing)}: finish the training (python -m kvwise.models.train)")
    check(folder, answers=answers)
    to.mkdir(parents=True, exist_ok=True)
    for name in (*SHIPPED, *(name for name in ADDED if (folder / name).is_file())):
        shutil.copyfile(folder / name, to / name)
    verify(to)
    typer.echo(f"shipped {folder} to {to}")


def main() -> None:
    """Run the command; errors are one line."""
    from kvwise.models.train.command import run

    sys.exit(run(ship))


if __name__ == "__main__":
    main()
