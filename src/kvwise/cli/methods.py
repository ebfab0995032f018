"""`kvwise methods`: what there is, and what composes with what."""

import json
from dataclasses import fields
from itertools import combinations
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvwise.core.method import Axis, Method
from kvwise.core.strategy import conflict
from kvwise.methods.catalogue import catalogue


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List all methods: axis, idea, options, paper, and which cannot work together."""
    kinds = list(catalogue())
    if as_json:
        typer.echo(json.dumps([_describe(kind) for kind in kinds], indent=2))
        return
    table = Table("method", "axis", "idea", "options", "paper", title="Methods")
    for kind in kinds:
        name = f"{kind.name} (default)" if kind.default else kind.name
        table.add_row(name, kind.axis.value, kind.idea, _options(kind), kind.paper)
    console = Console()
    console.print(table)
    for first, second, reason in refusals(kinds):
        console.print(f"{first} + {second}: refused, {reason}", highlight=False)


def refusals(kinds: list[type[Method]]) -> list[tuple[str, str, str]]:
    """Pairs of methods of different axes that cannot work together, and why."""
    order = list(Axis)
    found = []
    for first, second in combinations(sorted(kinds, key=lambda k: order.index(k.axis)), 2):
        reason = conflict(first(), second()) if first.axis is not second.axis else None
        if reason:
            found.append((first.name, second.name, reason))
    return found


def _options(kind: type[Method]) -> str:
    return ", ".join(f"{f.name}={f.default}" for f in fields(kind))


def _describe(kind: type[Method]) -> dict[str, object]:
    return {
        "name": kind.name,
        "axis": kind.axis.value,
        "default": kind.default,
        "idea": kind.idea,
        "paper": kind.paper,
        "options": {f.name: f.default for f in fields(kind)},
        "traits": sorted(trait.value for trait in kind.traits),
    }
