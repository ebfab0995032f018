"""`kvwise methods`: what there is, what it needs, and what composes with what."""

import json
from collections.abc import Iterable
from inspect import getdoc
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kvwise.core.errors import StrategyError, UsageError
from kvwise.core.method import Axis, Method
from kvwise.core.options import read_call, show_value
from kvwise.methods.catalogue import catalogue
from kvwise.methods.own import describe
from kvwise.methods.page import QUESTIONS, document
from kvwise.methods.pairs import pairs_of


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method in full: h2o.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page with the table of all pairs.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Try NAME, also with options, on a small model: does it keep its promises?")
    ] = False,
) -> None:
    """List all methods: axis, idea, paper, options, what they need, and what they cannot work with."""
    known = list(catalogue())
    if check and name is None:
        raise UsageError("--check runs one method: kvwise --methods my.py methods NAME --check")
    if markdown and (as_json or name is not None):
        raise UsageError("--markdown prints the whole page: leave out --json and the name")
    if markdown:
        typer.echo(document(known), nl=False)
        return
    called, options = (None, {}) if name is None else read_call(name, "method", StrategyError)
    chosen = known if called is None else [catalogue().find(called)]
    if check:
        _check(chosen[0].build(options))
    elif as_json:
        facts = [_facts(kind, known) for kind in chosen]
        typer.echo(json.dumps(facts if name is None else facts[0], indent=2))
    else:
        _print(chosen, known, in_full=name is not None)


def _check(method: Method) -> None:
    from kvwise.testing import check_method

    try:
        kept = check_method(method)
    except AssertionError as error:
        raise UsageError(str(error)) from error
    for promise in kept:
        typer.echo(f"ok  {promise}")


def _facts(kind: type[Method], known: list[type[Method]]) -> dict[str, Any]:
    met = pairs_of(kind, known)
    return describe(kind) | {
        "traits": sorted(trait.value for trait in kind().traits),
        "works_with": [pair.other(kind).name for pair in met if pair.reason is None],
        "refused_with": {pair.other(kind).name: pair.told_to(kind) for pair in met if pair.reason is not None},
    }


def _print(chosen: list[type[Method]], known: list[type[Method]], *, in_full: bool) -> None:
    # A line is never cut: in a pipe it stays one fact a line, a terminal wraps it.
    console = Console(highlight=False, soft_wrap=True)
    axis: Axis | None = None
    for kind in chosen:
        if kind.axis is not axis and not in_full:
            axis = kind.axis
            console.print(Text(f"{axis.value}: {QUESTIONS[axis]}\n", style="bold"))
        for label, text in _in_full(kind, known) if in_full else _in_short(kind, known):
            console.print(Text(label, style="bold cyan" if label == kind.name else "dim"), Text(text))
        console.print()
    if not in_full:
        console.print("kvwise methods NAME: all there is to say of one, and why it cannot work with others")


def _in_short(kind: type[Method], known: list[type[Method]]) -> Iterable[tuple[str, str]]:
    """(label, text) of a method: its name with its idea first."""
    facts = _facts(kind, known)
    yield kind.name, kind.idea + (" (default)" if kind.default else "")
    yield "  paper", kind.paper
    if facts["options"]:
        yield "  options", ", ".join(f"{option}={show_value(value)}" for option, value in facts["options"].items())
    if facts["needs"]:
        yield "  it", "; ".join(facts["needs"].values())
    yield "  works with", _but(facts["refused_with"])


def _but(refused: Iterable[str]) -> str:
    names = ", ".join(refused)
    return f"all of the other questions but {names}" if names else "all of the other questions"


def _in_full(kind: type[Method], known: list[type[Method]]) -> Iterable[tuple[str, str]]:
    facts = _facts(kind, known)
    yield kind.name, kind.idea + (" (default)" if kind.default else "")
    yield "  answers", f"{kind.axis.value}: {QUESTIONS[kind.axis]}"
    yield "  paper", kind.paper
    for option, value in facts["options"].items():
        yield "  option", f"{option}={show_value(value)} ({facts['types'][option]})"
    for need in facts["needs"].values():
        yield "  it", need
    yield "  works with", ", ".join(facts["works_with"]) or "nothing"
    for reason in dict.fromkeys(facts["refused_with"].values()):
        names = [name for name, why in facts["refused_with"].items() if why == reason]
        yield "  not with", f"{', '.join(names)}: {reason}"
    yield "  defined in", kind.__module__
    yield "", ""
    yield from (("", line) for line in (getdoc(kind) or "").splitlines())
