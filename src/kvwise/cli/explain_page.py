"""The picture of `explain` as one self-contained HTML page: each strip can be pointed at, walked by keys, and read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from kvwise.cli.explain import Explained, Strip
from kvwise.study.markup import pairs, table

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvwise: what was kept</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>What each layer and head kept</h1>
<p class="lead">A strip is the context of one request from its first token to its last, as one or more heads held it
when the request ended. Point at a strip, or go to it by the tab key and walk along it with the arrow keys, to see a
token.</p>
<ul class="legend">{legend}</ul>
<noscript><p class="notice">Strips are drawn by a script; the tables say the same in numbers.</p></noscript>
{body}
</main>
<div class="readout" id="readout" aria-hidden="true" hidden><p class="where"></p><p class="text"></p></div>
<script type="application/json" id="facts">{facts}</script>
<script>{js}</script>
</body>
</html>
"""


_LEGEND = {
    "open": "kept",
    "packed": "kept, packed in codes",
    "recalled": "brought back by the last step",
    "absent": "none of these",
}


def page(shown: Sequence[Explained], texts: Sequence[Sequence[str]]) -> str:
    """The page of some outputs; `texts` has the text of every token of each."""
    facts = [_facts(each, list(words)) for each, words in zip(shown, texts, strict=True)]
    css = files("kvwise.study").joinpath("page.css").read_text(encoding="utf-8")
    return _PAGE.format(
        legend="".join(f'<li><span class="swatch {kind}"></span>{name}</li>' for kind, name in _LEGEND.items()),
        css=css + _resource("explain.css"),
        body="\n".join(_section(number, each) for number, each in enumerate(shown)),
        facts=json.dumps(facts).replace("<", "\\u003c"),
        js=_resource("explain.js"),
    )


def _resource(name: str) -> str:
    return files("kvwise.cli").joinpath(name).read_text(encoding="utf-8")


def _facts(shown: Explained, texts: list[str]) -> dict[str, Any]:
    """What the script draws from; positions as runs [first, stop)."""
    return {
        "tokens": texts[: shown.num_tokens],
        "numTokens": shown.num_tokens,
        "numPrompt": shown.num_prompt,
        "absent": shown.absent,
        "strips": [
            {
                "label": strip.label,
                "open": _runs(strip.open),
                "packed": _runs(strip.packed),
                "recalled": _runs(strip.recalled),
            }
            for strip in shown.strips
        ],
    }


def _runs(positions: Iterable[int]) -> list[list[int]]:
    runs = []
    for _, run in groupby(enumerate(sorted(positions)), key=lambda pair: pair[1] - pair[0]):
        inside = [position for _, position in run]
        runs.append([inside[0], inside[-1] + 1])
    return runs


def _section(number: int, shown: Explained) -> str:
    strips = "\n".join(_strip(number, index, strip, shown) for index, strip in enumerate(shown.strips))
    head = ["Layers and heads", "Heads", "Kept", "Packed", "Brought back", "Share kept"]
    rows = [
        [
            escape(strip.label),
            str(strip.num_heads),
            str(strip.num_held),
            str(len(strip.packed)),
            str(len(strip.recalled)),
            f"{strip.num_held / max(1, shown.num_tokens):.1%}",
        ]
        for strip in shown.strips
    ]
    title = escape(shown.title).replace("+", "+<wbr>")
    return (
        f"<section>\n<h2>{title}</h2>\n<p class='soft'>Not in a strip: {escape(shown.absent)}. The line marks the end "
        f'of the prompt.</p>\n<div class="strips">\n{strips}\n</div>\n{pairs(shown.words)}\n'
        f"<details><summary>In numbers</summary>{table(head, rows, numeric=range(1, 6))}</details>\n</section>"
    )


def _strip(number: int, index: int, strip: Strip, shown: Explained) -> str:
    recalled = f", {len(strip.recalled)} brought back" if strip.recalled else ""
    name = f"{strip.label}: {strip.num_held} of {shown.num_tokens} tokens kept{recalled}"
    count = f"{strip.num_held} + {len(strip.recalled)}" if strip.recalled else str(strip.num_held)
    return (
        f'<div class="strip"><span class="label">{escape(strip.label)}</span>'
        f'<canvas data-output="{number}" data-strip="{index}" tabindex="0" role="slider" aria-label="{escape(name)}" '
        f'aria-valuemin="0" aria-valuemax="{max(0, shown.num_tokens - 1)}" aria-valuenow="0" '
        f'aria-valuetext="position 0"></canvas><span class="count">{count}</span></div>'
    )
