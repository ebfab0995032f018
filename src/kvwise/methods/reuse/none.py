"""None: every request computes its own KV."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Axis, Method, Trait


@dataclass(frozen=True)
class NoReuse(Method):
    """Nothing is shared between requests."""

    name: ClassVar[str] = "none"
    axis: ClassVar[Axis] = Axis.REUSE
    idea: ClassVar[str] = "compute everything"
    paper: ClassVar[str] = "-"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NO_PREFIX_KEYS})
    default: ClassVar[bool] = True
