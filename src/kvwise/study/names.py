"""What lines of a chart are called, and which strategies make one line: those that differ in one number."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_CALL = re.compile(r"([^(+]+)(?:\(([^()]*)\))?")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")

Call = tuple[str, tuple[tuple[str, str], ...]]  # a method with its options


@dataclass(frozen=True, slots=True)
class Line:
    """The line that a framework belongs to, and what tells it from the others there: `bits 2`; empty if none are."""

    name: str
    level: str = ""


def lines(frameworks: Sequence[str]) -> dict[str, Line]:
    """The line of every framework.

    Frameworks whose texts differ in the number of one option share a line without that option; where one could be on
    several, it is on the one with the most.
    """
    names = list(dict.fromkeys(frameworks))
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        for rest, option, _ in _without_a_number(name):
            groups[rest, option].append(name)
    chosen: dict[str, tuple[str, str, str]] = {}
    for name in names:
        found = [f for f in _without_a_number(name) if len(groups[f[:2]]) > 1]
        if found:
            chosen[name] = max(found, key=lambda f: len(groups[f[:2]]))
    members = Counter(found[:2] for found in chosen.values())
    # Whoever is alone on a line, since the others are on a longer one, keeps its whole name.
    shared = {name: found for name, found in chosen.items() if members[found[:2]] > 1}
    return {name: Line(shared[name][0], f"{shared[name][1]} {shared[name][2]}") if name in shared else Line(name)
            for name in names}  # fmt: skip


def labels(names: Sequence[str], among: Sequence[str] | None = None) -> dict[str, str]:
    """Short labels of lines: without the options that every use of a method `among` the frameworks has at one value.

    Of a method that is used once nothing is left out: see `shared`.
    """
    left_out = shared(names if among is None else among)
    out = {}
    for name in dict.fromkeys(names):
        parts = []
        for method, options in calls(name):
            told = [_word(key, value) for key, value in options if (method, key, value) not in left_out]
            parts.append(f"{method} {', '.join(told)}" if told else method)
        out[name] = "+".join(parts)
    return out


def shared(names: Sequence[str]) -> set[tuple[str, str, str]]:
    """(Method, option, value) of every option that all uses of a method, several, have at one value."""
    uses: dict[str, list[dict[str, str]]] = defaultdict(list)
    for name in dict.fromkeys(names):
        for method, options in calls(name):
            uses[method].append(dict(options))
    return {
        (method, key, value)
        for method, found in uses.items()
        if len(found) > 1
        for key, value in found[0].items()
        if all(options.get(key) == value for options in found)
    }


def shared_note(names: Sequence[str]) -> str:
    """What `labels` leaves out, in words."""
    told: Mapping[str, list[str]] = defaultdict(list)
    for method, key, value in sorted(shared(names)):
        told[method].append(f"{key}={value}")
    return "; ".join(f"{method} with {', '.join(options)}" for method, options in told.items())


def calls(framework: str) -> list[Call]:
    """The methods of a framework with their options: `h2o(heads=adakv)+int4` in parts."""
    out = []
    for part in framework.split("+"):
        found = _CALL.fullmatch(part.strip())
        if found is None:  # not a strategy of kvwise: then it is called as it is written
            return [(framework, ())]
        pairs = [option.partition("=") for option in (found[2] or "").split(",") if option.strip()]
        out.append((found[1].strip(), tuple((key.strip(), value.strip()) for key, _, value in pairs)))
    return out


def _without_a_number(framework: str) -> Iterator[tuple[str, str, str]]:
    """(The framework without one numeric option, that option, its value), for each of them."""
    parts = calls(framework)
    for place, (_, options) in enumerate(parts):
        for index, (key, value) in enumerate(options):
            if _NUMBER.fullmatch(value):
                rest = [(m, o if i != place else o[:index] + o[index + 1 :]) for i, (m, o) in enumerate(parts)]
                yield "+".join(_text(*call) for call in rest), key, value


def _text(method: str, options: Sequence[tuple[str, str]]) -> str:
    return method + (f"({', '.join(f'{key}={value}' for key, value in options)})" if options else "")


def _word(key: str, value: str) -> str:
    """An option as a label has it: words speak for themselves, numbers do not."""
    if value == "true":
        return key
    return value if value.replace("_", "").isalpha() and value != "false" else f"{key} {value}"
