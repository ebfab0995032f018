"""What a method is: one answer to one of the six questions about the KV of a token."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Self

from kvwise.core.errors import StrategyError
from kvwise.core.options import check_options, show_call, show_value


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
    RAGGED_HEADS = "keeps different numbers of tokens in the heads of a layer"
    LIVES_ON = "lets tokens that have left live on in what stays"
    FOLDS = "folds the keys of tokens that leave into a state"
    RECALLS = "keeps KV on the host and reads single tokens of it"
    PACKS = "packs tokens in groups that share codes, on the device"
    PRUNES_CHANNELS = "drops channels of keys"
    SHARES_LAYERS = "lets layers read the KV of earlier ones"
    NEEDS_PREFIX_KEYS = "finds stored KV by the keys of its prefix"
    NO_PREFIX_KEYS = "shares nothing, so prefixes have no keys"
    PRIVATE = "makes the kept bytes depend on the request"
    REPOSITIONS = "lays out and rotates anew what it keeps, stride by stride"


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
        return show_call(self.name, self)

    def require(self, option: str, ok: bool, limit: str) -> None:
        """Refuse the value of `option` unless `ok`, naming the value and the limit."""
        if not ok:
            value = show_value(getattr(self, option))
            raise StrategyError(f"{self.name}: {option}={value} is out of range: it must be {limit}")

    @classmethod
    def build(cls, options: Mapping[str, object]) -> Self:
        """Make the method from named options; unknown names and wrong types are refused with the known ones."""
        return cls(**check_options(cls.name, cls, options, StrategyError))
