"""`kvwise calibrate`: what a method must learn of a model before it serves it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvwise.core.errors import UsageError

if TYPE_CHECKING:
    from kvwise.models.calibrate_layers import Trial

app = typer.Typer(
    name="calibrate", help="Learn what a method must know of a model before it serves it.", no_args_is_help=False
)


@app.callback()
def _root() -> None:
    """Learn what a method must know of a model before it serves it."""


@app.command()
def kvsharer(
    model: Annotated[str, typer.Option(help="Folder, hub id, config.json, builtin:recall, or random:13m.")],
    share: Annotated[
        int | None, typer.Option(help="Layers that read another's KV; default: a quarter of them.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Cosine of the last hidden states that sharing must exceed.")] = 0.5,
    text: Annotated[
        Path | None, typer.Option(help="Sample: a FILE whose lines have 64 tokens or more, such as sentences.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the strategy to FILE, too.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
) -> None:
    """Find layers that can do with the KV of an earlier one; the strategy goes to standard output."""
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder; make it first")
    lines = None if text is None else _lines(text)
    # Bad options are refused above, before the seconds it takes to import torch and load a model.
    from kvwise.methods.encoding.kvsharer import sharing
    from kvwise.models.calibrate_layers import calibrate_layers, rows_of_text, sample_rows
    from kvwise.models.load import load_model

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    rows = sample_rows(loaded) if lines is None else rows_of_text(loaded, lines)
    wanted = max(1, loaded.num_layers // 4) if share is None else share
    found = calibrate_layers(loaded, rows, share=wanted, threshold=threshold, tell=_tell)
    stored, size = len(found.layers.stored), f"{rows.shape[0]} rows of {rows.shape[1]} tokens"
    typer.echo(f"{stored} of {loaded.num_layers} layers store KV; the sample was {size}", err=True)
    if loaded.num_layers - stored < wanted:
        typer.echo(f"fewer than {wanted} layers share: no other pair exceeds the threshold {threshold:g}", err=True)
    strategy = str(sharing(found.layers.reads))
    if out is not None:
        out.write_text(strategy + "\n", encoding="utf-8")
    typer.echo(strategy)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path} cannot be read: {error}") from error


def _tell(trial: "Trial") -> None:
    verdict = "shares" if trial.accepted else "no"
    typer.echo(
        f"layer {trial.reader} reads layer {trial.source}: distance {trial.distance:.3g}, "
        f"cosine {trial.similarity:.4f}: {verdict}",
        err=True,
    )
