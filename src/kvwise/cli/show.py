"""Tables on a terminal, plain lines in a pipe, JSON where it is asked for."""

import json
import sys
from collections.abc import Sequence
from math import inf
from typing import Any

import typer


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, breaks: Sequence[int] = ()) -> None:
    """Print rows under column names: a table for a person, tab-separated lines in a pipe.

    `breaks` are the rows behind which a group of them ends.
    """
    if not sys.stdout.isatty():
        for line in (columns, *rows):
            typer.echo("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for number, row in enumerate(rows):
        table.add_row(*row, end_section=number in breaks)
    Console(highlight=False).print(table)


def show_json(value: object) -> None:
    """Print one JSON value; times without end are null."""
    typer.echo(json.dumps(_finite(value), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value in (inf, -inf) else value
