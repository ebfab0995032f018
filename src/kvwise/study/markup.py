"""Pieces of the page: tables, lists and names as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from kvwise.study.who import Who


def who(given: Who, paint: Mapping[str, str]) -> str:
    """A strategy's name with a dot of its colour."""
    name = escape(given.label)
    return f'<span class="who" style="--hue:{paint[given.framework]}"><span class="dot"></span>{name}</span>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Iterable[int] = (),
    *,
    stack: bool = False,
    keep_first: bool = False,
) -> str:
    """A table that scrolls sideways on a narrow screen, if asked with its first column kept in sight.

    With `stack` each row becomes a card there. What follows a line break in a column's name is set in small print.
    """
    right = set(numeric)
    kind = [' class="num"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{_head(name)}</th>" for name, k in zip(head, kind, strict=True))
    names = [name.partition("\n")[0] for name in head]
    body = "\n".join(
        "<tr>" + "".join(_cell(*parts) for parts in zip(row, kind, names, strict=True)) + "</tr>" for row in rows
    )
    style = "scroll" + (" stack" if stack else "") + (" keep" if keep_first else "")
    return f'<div class="{style}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(name: str) -> str:
    first, _, rest = name.partition("\n")
    return escape(first) + (f'<span class="sub">{escape(rest)}</span>' if rest else "")


def _cell(text: str, kind: str, name: str) -> str:
    return f'<td{kind} data-name="{escape(name)}">{text}</td>'


def pairs(given: Iterable[tuple[str, str]]) -> str:
    """Names and words in two columns."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in given) + "</dl>"


def bullets(items: Sequence[str], none: str = "") -> str:
    """A list; `none` where there is nothing to list."""
    if not items:
        return f"<p>{escape(none)}</p>" if none else ""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
