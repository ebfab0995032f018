"""A strategy: one answer to each of the six questions, as a value that prints as one line and parses back."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Protocol

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis, Method, Trait
from kvwise.core.options import read_call

# Pairs of traits that cannot work together, and why. The table of what composes with what is derived from this.
CONFLICTS: tuple[tuple[Trait, Trait, str], ...] = (
    (
        Trait.NEEDS_EVERY_ROW,
        Trait.SKIPS_ROWS,
        "the first ranks tokens by the attention of every prompt row, and rows of reused tokens are never computed",
    ),
    (
        Trait.OWNS_PAGES,
        Trait.OWNS_PAGES,
        "both rearrange a request's pages after prefill, and a page can have one owner",
    ),
    (
        Trait.RECALLS,
        Trait.LIVES_ON,
        "the first brings back tokens that have left, and those of the second live on in what stays: they would count "
        "twice",
    ),
    (
        Trait.RECALLS,
        Trait.RAGGED_HEADS,
        "the first is asked for equally many tokens in each head of a layer, and from the heads of the second "
        "different numbers have left",
    ),
    (
        Trait.RECALLS,
        Trait.PACKS,
        "the first reads single tokens of what lies on the host, and tokens packed together are read by whole pages",
    ),
    (
        Trait.RECALLS,
        Trait.SHARES_LAYERS,
        "the first looks for the tokens of a layer by queries and keys of its own, and layers that share KV have keys "
        "of another",
    ),
    (
        Trait.FOLDS,
        Trait.PRUNES_CHANNELS,
        "the first was trained on whole keys, and the second has dropped channels of them",
    ),
    (
        Trait.REPOSITIONS,
        Trait.PACKS,
        "the first moves and rotates kept keys after every stride, and packed ones stay in their group as they are",
    ),
    (
        Trait.RECALLS,
        Trait.REPOSITIONS,
        "the first finds tokens on the host by the positions they had, and the second rotates their keys to others",
    ),
    (
        Trait.NO_PREFIX_KEYS,
        Trait.NEEDS_PREFIX_KEYS,
        "stored KV is found by the keys of its prefix, which only the reuse of prefixes makes: add '+prefix'",
    ),
)


class Catalogue(Protocol):
    """Where method names are looked up."""

    def find(self, name: str) -> type[Method]:
        """The method called `name`; StrategyError naming the known ones if there is none."""
        ...

    def default(self, axis: Axis) -> Method:
        """The answer an axis has when nothing is named."""
        ...


@dataclass(frozen=True)
class Strategy:
    """One method per axis. Refused when built, with the reason, if a pair cannot work together."""

    retention: Method
    selection: Method
    encoding: Method
    reuse: Method
    loading: Method
    decoding: Method

    def __post_init__(self) -> None:
        for axis, method in zip(Axis, self.methods(), strict=True):
            if method.axis is not axis:
                raise StrategyError(f"{method.name} answers {method.axis}, not {axis}")
        for first, second in combinations(self.methods(), 2):
            reason = conflict(first, second)
            if reason:
                raise StrategyError(f"{first.name} and {second.name} cannot work together: {reason}")

    def methods(self) -> Iterator[Method]:
        """The six methods in axis order."""
        return (getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        named = [str(m) for m in self.methods() if not m.default]
        return "+".join(named) or str(self.retention)

    def to_toml(self) -> str:
        """One line of TOML that `parse_strategy` reads back."""
        return f'strategy = "{self}"'


def conflict(first: Method, second: Method) -> str | None:
    """Why two methods cannot work together, or None if they can."""
    for a, b, reason in CONFLICTS:
        if a in first.traits and b in second.traits:
            return reason
        if a in second.traits and b in first.traits:
            return reason.replace("the first", second.name).replace("the second", first.name)
    return None


def parse_strategy(text: str, catalogue: Catalogue) -> Strategy:
    """Read `h2o(budget=0.2)+prefix`. What is not named has its default; each axis may be named once."""
    chosen: dict[Axis, Method] = {}
    for part in _split(text):
        method = _parse_method(part, catalogue)
        if method.axis in chosen:
            raise StrategyError(
                f"{chosen[method.axis].name} and {method.name} both answer {method.axis.value!r}: name one of them"
            )
        chosen[method.axis] = method
    return make_strategy(chosen, catalogue)


def make_strategy(chosen: Mapping[Axis, Method], catalogue: Catalogue) -> Strategy:
    """A strategy of the chosen methods and the defaults of all other axes."""
    return Strategy(*(chosen.get(axis) or catalogue.default(axis) for axis in Axis))


def _split(text: str) -> list[str]:
    """Cut at `+` outside parentheses."""
    parts = [p.strip() for p in re.split(r"\+(?![^(]*\))", text)]
    if not text.strip() or not all(parts):
        raise StrategyError(f"{text!r} is no strategy; write methods joined by '+', such as 'h2o(budget=0.2)'")
    return parts


def _parse_method(text: str, catalogue: Catalogue) -> Method:
    name, options = read_call(text, "method", StrategyError)
    return catalogue.find(name).build(options)
