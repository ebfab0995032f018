"""What each layer and head held of a request, as a picture of characters and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from kvwise.core.errors import StrategyError
from kvwise.core.method import Trait
from kvwise.core.output import HeadReport, RequestOutput
from kvwise.methods.catalogue import parse

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120  # columns where there is no terminal
OPEN, PACKED, RECALLED = "▁▂▃▄▅▆▇█", "░▒▓", "∘•"  # the last character: every token of that place
STYLES = {OPEN: "bright_blue", PACKED: "yellow", RECALLED: "magenta"}


@dataclass(frozen=True, slots=True)
class Strip:
    """Heads that held the same: what is drawn once. `packed` are the positions that lie in packed pages."""

    label: str
    num_heads: int
    open: tuple[int, ...]
    packed: tuple[int, ...]
    recalled: tuple[int, ...]

    @property
    def num_held(self) -> int:
        """Tokens that a head had on the device."""
        return len(self.open) + len(self.packed)


@dataclass(frozen=True, slots=True)
class Explained:
    """One output: its strips, how many positions there were, and the attestation in words."""

    title: str
    strips: list[Strip]
    num_tokens: int
    num_prompt: int
    absent: str  # what became of tokens that are in no strip
    words: list[tuple[str, str]]


def explained(output: RequestOutput) -> Explained:
    """What there is to draw of an output that was asked to explain itself."""
    heads = output.attestation.heads or []
    last = max((max([*head.kept, *head.recalled], default=-1) for layer in heads for head in layer), default=-1)
    num_tokens = max(output.attestation.tokens_seen, last + 1)
    strips = strips_of(heads)
    return Explained(
        title=f"{output.request_id}.{output.index}: {output.attestation.strategy}",
        strips=strips,
        num_tokens=num_tokens,
        num_prompt=len(output.prompt_token_ids),
        absent=_absent(output.attestation.strategy),
        words=_words(output, strips, num_tokens),
    )


# -- strips -----------------------------------------------------------------------------------------------------------


def strips_of(heads: Sequence[Sequence[HeadReport]]) -> list[Strip]:
    """One strip for all heads of neighbouring layers that held the same."""
    strips = []
    for _, same in groupby(enumerate(heads), key=lambda numbered: [_facts(head) for head in numbered[1]]):
        layers = list(same)
        reports = layers[0][1]
        where = _numbers("layer", [number for number, _ in layers])
        for facts in dict.fromkeys(map(_facts, reports)):
            mine = [number for number, report in enumerate(reports) if _facts(report) == facts]
            who = "all heads" if len(mine) == len(reports) > 1 else _numbers("head", mine)
            kept, num_packed, recalled = facts
            strips.append(
                Strip(f"{where}, {who}", len(mine) * len(layers), kept[num_packed:], kept[:num_packed], recalled)
            )
    return strips


def _facts(report: HeadReport) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    return tuple(report.kept), report.num_packed, tuple(report.recalled)


def _numbers(what: str, numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0-2`, `heads 0, 2-3`."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    said = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{what}{'s' if len(numbers) > 1 else ''} {said}"


def cells(strip: Strip, num_tokens: int, width: int) -> list[tuple[str, str]]:
    """(kind, character) for each place of a strip; the kind is the scale of what most of its tokens are, or "".

    A place stands for the tokens `i * num_tokens // n` up to the next place's, n the number of places: at most `width`.
    """
    num = min(num_tokens, width)
    counts = {kind: [0] * num for kind in (RECALLED, PACKED, OPEN)}
    for kind, positions in ((OPEN, strip.open), (PACKED, strip.packed), (RECALLED, strip.recalled)):
        for position in positions:
            counts[kind][(position * num + num - 1) // num_tokens] += 1
    drawn = []
    for place in range(num):
        size = (place + 1) * num_tokens // num - place * num_tokens // num
        total = sum(each[place] for each in counts.values())
        kind = max(counts, key=lambda kind: counts[kind][place]) if total else ""
        drawn.append((kind, kind[-(-min(total, size) * len(kind) // size) - 1] if kind else " "))
    return drawn


# -- the terminal -----------------------------------------------------------------------------------------------------


def draw(console: Console, shown: Explained) -> None:
    """Print picture, legend and words; colours where the console has them."""
    told = [_told(strip, shown.num_tokens) for strip in shown.strips]
    room = max(console.width, 60)
    left = max([len(strip.label) for strip in shown.strips] + [8])
    width = max(10, room - left - max(map(len, told), default=0) - 4)
    console.print(Text(shown.title, style="bold"))
    for strip, count in zip(shown.strips, told, strict=True):
        line = Text(f"{strip.label:<{left}} ").append("│", "dim")
        for kind, run in groupby(cells(strip, shown.num_tokens, width), key=lambda cell: cell[0]):
            line.append("".join(character for _, character in run), STYLES.get(kind, ""))
        console.print(line.append("│", "dim").append(f" {count}"), soft_wrap=True)
    console.print(Text(_ruler(shown, left, width), style="dim"), soft_wrap=True)
    for line in _legend(shown, width):
        console.print(line, soft_wrap=True)
    for name, text in shown.words:
        console.print(Text(f"{name:<{left}} ", style="dim").append(text, "default"), soft_wrap=True)


def _told(strip: Strip, num_tokens: int) -> str:
    recalled = f" + {len(strip.recalled)}" if strip.recalled else ""
    return f"{strip.num_held}{recalled} of {num_tokens}"


def _ruler(shown: Explained, left: int, width: int) -> str:
    """Where the positions lie: the first, the first of the output, and the last."""
    num = min(shown.num_tokens, width)
    line = [" "] * (left + 2 + num)
    marks = [(0, "0"), (shown.num_prompt, f"↑{shown.num_prompt}"), (shown.num_tokens - 1, str(shown.num_tokens - 1))]
    for position, text in marks:
        if 0 <= position < shown.num_tokens:
            place = position * num // shown.num_tokens
            start = left + 2 + max(0, min(place, num - len(text)))
            if all(c == " " for c in line[max(0, start - 1) : start + len(text) + 1]):
                line[start : start + len(text)] = text
    return "".join(line).rstrip()


def _legend(shown: Explained, width: int) -> Iterable[Text]:
    kinds = {
        OPEN: ("kept", any(strip.open for strip in shown.strips)),
        PACKED: ("kept, packed in codes", any(strip.packed for strip in shown.strips)),
        RECALLED: ("brought back by the last step", any(strip.recalled for strip in shown.strips)),
    }
    each = -(-shown.num_tokens // max(1, min(shown.num_tokens, width)))
    line = Text()
    for kind, (name, occurs) in kinds.items():
        if occurs:
            line.append(kind if each > 1 else kind[-1], STYLES[kind]).append(f" {name}   ")
    full = any(strip.num_held < shown.num_tokens for strip in shown.strips)
    if full:
        line.append(f"blank: {shown.absent}")
    yield line
    if each > 1:
        yield Text(f"a place stands for up to {each} tokens: the higher or darker, the more of them", style="dim")
    if 0 < shown.num_prompt < shown.num_tokens:
        yield Text(f"↑{shown.num_prompt}: the first token of the output", style="dim")


# -- words ------------------------------------------------------------------------------------------------------------


def _absent(strategy: str) -> str:
    """What became of tokens that no strip shows, as far as the strategy's methods say it."""
    try:
        traits = frozenset[Trait]().union(*(method.traits for method in parse(strategy).methods()))
    except StrategyError:  # of a method that is not known here
        return "not held"
    if Trait.RECALLS in traits:
        return "on the host"
    return "dropped, living on in what stays" if Trait.LIVES_ON in traits else "dropped"


def _words(output: RequestOutput, strips: Sequence[Strip], num_tokens: int) -> list[tuple[str, str]]:
    done = output.attestation
    num_prompt = min(len(output.prompt_token_ids), num_tokens)
    words = [
        ("seen", f"{num_tokens} tokens: {num_prompt} of the prompt, {num_tokens - num_prompt} of the output"),
        ("kept", _kept(strips, num_tokens)),
        ("dropped", f"{done.tokens_dropped:,} tokens, counted in each layer and head"),
    ]
    if done.tokens_merged:
        words.append(("merged", f"{done.tokens_merged:,} of those into tokens that stay"))
    if done.fetch_candidates:
        share = done.tokens_fetched / done.fetch_candidates
        cached = f", {done.tokens_recalled_cached:,} of them still on the device" if done.tokens_recalled_cached else ""
        words.append(
            ("recalled", f"{done.tokens_fetched:,} of {done.fetch_candidates:,} that could be ({share:.1%}){cached}")
        )
    if done.bits_per_element:
        words.append(("bits", f"{done.bits_per_element:.4g} per element of K and V"))
    words.append(("freed", f"{done.bytes_freed / 2**20:.2f} MiB on the device"))
    return words


def _kept(strips: Sequence[Strip], num_tokens: int) -> str:
    counts = [strip.num_held for strip in strips for _ in range(strip.num_heads)]
    if not counts or not num_tokens:
        return "nothing: the request held no KV when it ended"
    mean = sum(counts) / len(counts)
    spread = (
        "" if min(counts) == max(counts) else f" on average of {len(counts)} heads, {min(counts)} to {max(counts)},"
    )
    return f"{mean:.4g}{spread} of {num_tokens} on the device ({mean / num_tokens:.1%})"
