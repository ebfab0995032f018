"""`kvwise train`: what a method must learn about a model before it can serve it."""

from pathlib import Path
from typing import Annotated

import typer

from kvwise.core.errors import UsageError

app = typer.Typer(help="Train what a method needs of a model; the model's own weights stay as they are.")


@app.callback()
def _root() -> None:
    """Train what a method needs of a model; the model's own weights stay as they are."""


@app.command("less")
def less(
    model: Annotated[str, typer.Option(help="Folder, hub id, config.json, builtin:recall, or random:13m.")],
    out: Annotated[Path, typer.Option(help="File to write; less.safetensors beside the weights is found by itself.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to learn from; built-in models have texts of their own.")
    ] = None,
    num_texts: Annotated[int, typer.Option(min=1, help="Texts, each seen once.")] = 2000,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a text.")] = 384,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size; default: four times the head size.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of Adam, falling to 0.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Draws the texts.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 2,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the kernels of the method less on a model's own attention, layer by layer and head by head."""
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder; make it first")
    import torch

    from kvwise.models.load import load_model
    from kvwise.models.train.less import train

    torch.set_num_threads(threads)
    loaded = load_model(model, dtype=dtype, device=device)
    lost = train(
        loaded, out, file=text, num_texts=num_texts, length=length, hidden=hidden, learning_rate=learning_rate,
        seed=seed, say=typer.echo,
    )  # fmt: skip
    shares = ", ".join(f"{share:.2f}" for share in lost)
    typer.echo(f"{out}: of what h2o loses, less loses {shares} (squared error by layer, on texts it has not seen)")
