"""Prefix: full blocks of an equal prefix are shared, found by a chain of hashes."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Axis, Method, Trait


@dataclass(frozen=True)
class Prefix(Method):
    """Automatic prefix caching: requests share the blocks up to which their tokens, salt and model are equal."""

    name: ClassVar[str] = "prefix"
    axis: ClassVar[Axis] = Axis.REUSE
    idea: ClassVar[str] = "share blocks of equal prefixes"
    paper: ClassVar[str] = "PagedAttention, arXiv 2309.06180; vLLM automatic prefix caching"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.SKIPS_ROWS})
