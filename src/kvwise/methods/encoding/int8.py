"""int8: sealed tokens as integers of eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.method import Trait
from kvwise.methods.encoding.integers import Integers


@dataclass(frozen=True)
class Int8(Integers):
    """Codes of 8 bits: keys per channel over `group` tokens, values per token over `value_group` channels.

    Outliers of keys live in fixed channels, so that a range per channel is the narrow one; those of values do not
    (KIVI, arXiv 2402.02750, section 3.1). Step and zero of a group are float16, made of its smallest and largest
    number. `key_bits` and `value_bits` may differ; 16 leaves keys or values in the pool's dtype.
    """

    key_bits: int = 8
    value_bits: int = 8

    name: ClassVar[str] = "int8"
    idea: ClassVar[str] = "store KV as 8-bit integers, keys per channel and values per token"
    paper: ClassVar[str] = "axes of KIVI, arXiv 2402.02750"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.PACKS})
