"""`kvwise`: the commands, and what becomes of their errors (one line, exit 2)."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvwise import __version__
from kvwise.cli import bench, cache, calibrate, generate, keys, serve, study, train
from kvwise.cli.methods import methods as list_methods
from kvwise.core.errors import KvwiseError, UsageError

app = typer.Typer(
    name="kvwise",
    help="The KV cache of LLM inference: every published method on one paged engine, measured side by side.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"auto_envvar_prefix": "KVWISE", "help_option_names": ["-h", "--help"]},
)


# The parser's errors. Typer brings click along under varying names, but its public error always derives from them.
BAD_COMMAND_LINE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvwise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it and exit."),
    methods: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Methods of your own: my.py or a module; may be given several times."),
    ] = None,
) -> None:
    """The KV cache of LLM inference: every published method on one paged engine, measured side by side."""
    if methods and not ctx.resilient_parsing:
        from kvwise.methods.catalogue import using

        ctx.with_resource(using(*methods))


app.command("generate")(generate.generate)
app.command("serve", context_settings=serve.ENVIRONMENT)(serve.serve)
app.command("methods")(list_methods)
app.add_typer(study.app, name="study")
app.add_typer(cache.app, name="cache")
app.add_typer(serve.config_app, name="config")
app.add_typer(keys.app, name="keys")
app.add_typer(train.app, name="train")
app.add_typer(calibrate.app, name="calibrate")
app.command("bench")(bench.bench)


def main() -> None:
    """Run the command line. Exit 0: done; 2: the caller can mend it; 1: a fault of kvwise's; 130: interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status; errors are one line on standard error."""
    try:
        result = app(arguments or ["--help"], prog_name="kvwise", standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except UsageError as error:
        return _say(str(error), 2)
    except KvwiseError as error:
        return _say(str(error), 1)
    except BAD_COMMAND_LINE as error:
        return _say(f"{error.format_message()} (see kvwise --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has left: no more of it, and no complaint from the interpreter on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _say(message: str, status: int) -> int:
    typer.echo(f"kvwise: {' '.join(message.split())}", err=True)
    return status
