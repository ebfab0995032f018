"""All: a query reads every token that is kept."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.methods.selection.base import Index, IndexShape, Selection


@dataclass(frozen=True)
class All(Selection):
    """Ordinary attention."""

    name: ClassVar[str] = "all"
    idea: ClassVar[str] = "read every kept token"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True

    def index(self, shape: IndexShape) -> Index:
        """Never asked: nothing is looked up."""
        raise AssertionError("reading everything needs no index")
