"""What a method is: one answer to one of the six questions about the KV of a token."""

from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar

from kvwise.core.errors import StrategyError


class Axis(StrEnum):
    """The six questions. A strategy gives one answer to each."""

    RETENTION = "retention"  # which tokens stay?
    SELECTION = "selection"  # which stored tokens does this query read?
    ENCODING = "encoding"  # in how many bytes?
    REUSE = "reuse"  # whose KV may stand in for computing it?
    LOADING = "loading"  # how does stored KV come back?
    DECODING = "decoding"  # how many tokens in a step?


class Trait(StrEnum):
    """What a method needs of the engine or does to the KV; pairs are judged by these alone."""

    NEEDS_EVERY_ROW = "ranks tokens by the attention of every prompt row"
    NEEDS_LAST_ROWS = "ranks tokens by the attention of the prompt's last rows"
    SKIPS_ROWS = "reuses KV, so the rows of the reused tokens are never computed"
    OWNS_PAGES = "rearranges a request's pages after prefill"
    PRIVATE = "makes the kept bytes depend on the request"


@dataclass(frozen=True)
class Method:
    """One method with its options: a value one can print, hash, compare and sweep.

    A subclass is a frozen dataclass whose fields are the options. It states `name`, `axis`, `idea` (one line),
    `paper` and `traits`. `default` marks the answer an axis has when nothing is named.
    """

    name: ClassVar[str]
    axis: ClassVar[Axis]
    idea: ClassVar[str]
    paper: ClassVar[str]
    traits: ClassVar[frozenset[Trait]] = frozenset()
    default: ClassVar[bool] = False

    def __str__(self) -> str:
        given = [
            f"{f.name}={_show(getattr(self, f.name))}"
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def require(self, option: str, ok: bool, limit: str) -> None:
        """Refuse the value of `option` unless `ok`, naming the value and the limit."""
        if not ok:
            value = getattr(self, option)
            raise StrategyError(f"{self.name}: {option}={_show(value)} is out of range: it must be {limit}")

    @classmethod
    def build(cls, options: dict[str, Any]) -> "Method":
        """Make the method from named options; unknown names and wrong types are refused with the known ones."""
        known = {f.name: f for f in fields(cls)}
        for name in options:
            if name not in known:
                have = ", ".join(known) or "none"
                raise StrategyError(f"{cls.name} has no option {name!r}; its options: {have}")
        typed = {n: _typed(cls.name, n, value, known[n].type) for n, value in options.items()}
        return cls(**typed)


def _show(value: object) -> str:
    """Short where that says it all: what is printed parses back to the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


# Annotation of an option -> what it accepts, and the word for it.
_WANTED: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a word"),
    "bool": ((bool,), "true or false"),
}


def _typed(method: str, option: str, value: object, annotation: object) -> object:
    """The value as its option's type; StrategyError if it is of another."""
    # An annotation is a type, or its text where the module says `from __future__ import annotations`.
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if (wanted := _WANTED.get(text.removesuffix(" | None"))) is None:
        return value  # the method's own type, which it checks itself
    accepts, word = wanted
    if not isinstance(value, accepts) or (isinstance(value, bool) and bool not in accepts):
        raise StrategyError(f"{method}: {option}={value!r} must be {word}")
    return float(value) if isinstance(value, int) and float in accepts else value
