"""Compute: KV that is not in the device pool is computed again."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Trait
from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress


@dataclass(frozen=True)
class Compute(Loading):
    """Nothing is stored in or loaded from a lower tier."""

    name: ClassVar[str] = "compute"
    idea: ClassVar[str] = "compute what is missing"
    paper: ClassVar[str] = "-"
    traits: ClassVar[frozenset[Trait]] = frozenset()
    default: ClassVar[bool] = True

    @property
    def codec(self) -> None:
        """Nothing is stored."""

    def decide(self, outlook: Outlook) -> Decision:
        """Leave it where it is."""
        return Decision.COMPUTE

    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """Nothing."""
        return None

    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Always."""
        return True
