"""One: a step yields one token per running sequence."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Axis, Method


@dataclass(frozen=True)
class One(Method):
    """Ordinary autoregressive decoding."""

    name: ClassVar[str] = "one"
    axis: ClassVar[Axis] = Axis.DECODING
    idea: ClassVar[str] = "one token a step"
    paper: ClassVar[str] = "-"
    default: ClassVar[bool] = True
