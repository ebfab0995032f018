"""`python -m kvwise.models.train`: train a model of the built-in kind and judge it."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvwise.models.train.loop import State, Trainer, half_is_faster
from kvwise.models.train.recipe import RECIPES


def train(
    out: Annotated[Path, typer.Argument(help="Folder for the model; a training that is there goes on.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "small",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 2,
    device: str = "cpu",
) -> None:
    """Train, save as a Hugging Face folder, and measure every task at every length."""
    if size not in RECIPES:
        raise typer.BadParameter(f"{size!r} is no recipe; there are {', '.join(RECIPES)}")
    torch.set_num_threads(threads)
    where = torch.device(device)
    trainer = Trainer(RECIPES[size], seed, out, where, half=half_is_faster(where))
    began = time.monotonic()

    def watch(state: State, loss: float) -> None:
        if state.step % 50 == 0:
            known = " ".join(f"{kind} {value:.2f}" for kind, value in sorted(state.accuracy.items()))
            done = state.num_tokens / trainer.recipe.num_tokens
            length = trainer.recipe.stages[state.stage]
            print(f"{done:4.0%} {time.monotonic() - began:5.0f} s  T={length:<4} loss {loss:.3f}  {known}", flush=True)

    trainer.run(watch)
    trainer.model.save_pretrained(out)


if __name__ == "__main__":
    typer.run(train)
