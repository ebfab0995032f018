"""A strategy as tables and charts name it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvwise.study.cells import label


@dataclass(frozen=True, slots=True)
class Who:
    """A strategy as shown and compared."""

    framework: str
    budget: float | None
    strategy: str

    @property
    def label(self) -> str:
        """Framework and budget."""
        return label(self.framework, self.budget)

    @property
    def order(self) -> tuple[str, float, str]:
        """Sorts frameworks by name and budgets from large to small."""
        return self.framework, -(1.0 if self.budget is None else self.budget), self.strategy


def who_of(row: Mapping[str, Any]) -> Who:
    """The strategy of a row."""
    return Who(row["framework"], row["budget"], row["strategy"])
