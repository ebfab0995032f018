"""docs/methods.md, made of the methods themselves: what each is, and what composes with what.

`python -m kvwise.methods.page > docs/methods.md` makes it anew; `kvwise methods --markdown` prints it with the methods
of the user's own.
"""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from kvwise.core.method import Axis, Method, Trait
from kvwise.core.options import show_value
from kvwise.methods.catalogue import built_in
from kvwise.methods.own import describe
from kvwise.methods.pairs import Pair, pairs

WIDTH = 115
QUESTIONS = {
    Axis.RETENTION: "which tokens stay?",
    Axis.SELECTION: "which stored tokens does this query read?",
    Axis.ENCODING: "in how many bytes?",
    Axis.REUSE: "whose KV may stand in for computing it?",
    Axis.LOADING: "how does stored KV come back?",
    Axis.DECODING: "how many tokens in a step?",
}
_PAGE = """# Methods

A strategy gives one answer to each of six questions; each answer is a method with its options, written as in
`h2o(budget=0.2)+prefix+cake`. What is not named has its default. `kvwise methods NAME` says all there is to say of one;
[add-a-method.md](add-a-method.md) tells how to write one of your own. How ours differ from the papers is in
[design.md](design.md).

{axes}

## What composes with what

A method declares traits: what it needs, and what it does to the KV. A pair of methods of different questions is refused
if their traits exclude each other, for the reason given; every other pair works. Of {num_pairs} pairs **{num_allowed}
are allowed** and **{num_refused} refused**. Two answers to one question are never named together. Options may add a
trait: then the strategy that names them is refused with the same reasons.

{tables}

Why:

{reasons}

## Traits

| trait | a method that has it | methods |
|---|---|---|
{traits}

This page is made by `python -m kvwise.methods.page`; a test compares the two.
"""


def document(kinds: Iterable[type[Method]] | None = None) -> str:
    """The text of docs/methods.md; of kvwise's own methods unless others are given."""
    known = list(built_in() if kinds is None else kinds)
    found = pairs(known)
    reasons = _reasons(found)
    refused = sum(pair.reason is not None for pair in found)
    return _PAGE.format(
        axes="\n\n".join(_axis(axis, [kind for kind in known if kind.axis is axis]) for axis in Axis),
        num_pairs=len(found),
        num_allowed=len(found) - refused,
        num_refused=refused,
        tables="\n\n".join(_pair_table(*axes, known, found, reasons) for axes in combinations(Axis, 2)),
        reasons="\n".join(_numbered(number, reason) for reason, number in reasons.items()),
        traits="\n".join(_trait(trait, known) for trait in Trait),
    )


def _axis(axis: Axis, kinds: Sequence[type[Method]]) -> str:
    rows = [_row(describe(kind)) for kind in kinds]
    head = f"## {axis.value.capitalize()}: {QUESTIONS[axis]}"
    return "\n".join([head, "", "| method | idea | options | paper |", "|---|---|---|---|", *rows])


def _row(facts: dict[str, Any]) -> str:
    name = f"`{facts['name']}`" + (" (default)" if facts["default"] else "")
    options = ", ".join(f"`{option}={show_value(value)}`" for option, value in facts["options"].items())
    return f"| {name} | {facts['idea']} | {options or 'none'} | {facts['paper']} |"


def _reasons(found: Iterable[Pair]) -> dict[str, int]:
    """Reason -> its number, in the order in which the tables name them."""
    return {reason: number for number, reason in enumerate(dict.fromkeys(p.reason for p in found if p.reason), 1)}


def _numbered(number: int, reason: str) -> str:
    return textwrap.fill(f"{number}. {reason}.", WIDTH, subsequent_indent="   ")


def _pair_table(
    first: Axis, second: Axis, kinds: Sequence[type[Method]], found: Sequence[Pair], reasons: dict[str, int]
) -> str:
    """The pairs of two axes: a sentence where all of them work."""
    met = {(p.first.name, p.second.name): p.reason for p in found if (p.first.axis, p.second.axis) == (first, second)}
    refused = sum(reason is not None for reason in met.values())
    head = f"### {first.value.capitalize()} and {second.value}"
    if not refused:
        return f"{head}\n\nAll {len(met)} pairs work."
    rows, columns = ([kind.name for kind in kinds if kind.axis is axis] for axis in (first, second))
    lines = [
        f"| `{row}` | " + " | ".join(_cell(met[row, column], reasons) for column in columns) + " |" for row in rows
    ]
    top = "| | " + " | ".join(f"`{name}`" for name in columns) + " |"
    told = f"{len(met) - refused} of {len(met)} pairs work; a number is the reason why one does not."
    return "\n".join([head, "", told, "", top, "|---" * (len(columns) + 1) + "|", *lines])


def _cell(reason: str | None, reasons: dict[str, int]) -> str:
    return "yes" if reason is None else f"no ({reasons[reason]})"


def _trait(trait: Trait, kinds: Iterable[type[Method]]) -> str:
    having = ", ".join(f"`{kind.name}`" for kind in kinds if trait in kind().traits)
    return f"| `{trait.name}` | {trait.value} | {having or '-'} |"


if __name__ == "__main__":
    print(document(), end="")
