"""Compute: KV that is not in the device pool is computed again."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Axis, Method


@dataclass(frozen=True)
class Compute(Method):
    """Nothing is loaded from a lower tier."""

    name: ClassVar[str] = "compute"
    axis: ClassVar[Axis] = Axis.LOADING
    idea: ClassVar[str] = "compute what is missing"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True
