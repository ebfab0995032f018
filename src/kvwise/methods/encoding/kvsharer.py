"""KVSharer: some layers store no KV and read that of an earlier, dissimilar layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvwise.core.errors import StrategyError
from kvwise.core.method import Trait
from kvwise.methods.encoding.base import Encoding, EncodingShape

ALL = "all"  # every layer stores its own
_MAP = re.compile(r"\d+:\d+(-\d+:\d+)*")


@dataclass(frozen=True)
class KVSharer(Encoding):
    """KVSharer, arXiv 2410.18517: `map=3:1-5:2` says that layer 3 reads layer 1 and layer 5 reads layer 2.

    `kvwise calibrate kvsharer` finds the map of a model. Layers that read another's store nothing: the pool holds
    more tokens, in all its tiers. Queries of such a layer meet keys and values that another layer made of its own
    input; where a source reads another layer in turn, that one is read. Their modules still project keys and values,
    as in the released code, whose saving (and this one's) is memory, not computation. The map is a part of the
    identity of stored KV, which it changes from the first shared layer on.

    A retention method ranks tokens by the attention of the layers that store. `map=all` lets every layer store its own:
    the model as it is, for comparison. Without a map there is nothing to do, which is refused.
    """

    map: str = ""

    name: ClassVar[str] = "kvsharer"
    idea: ClassVar[str] = "let some layers read the KV of an earlier, dissimilar one and store none"
    paper: ClassVar[str] = "KVSharer, arXiv 2410.18517"
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.SHARES_LAYERS})

    def __post_init__(self) -> None:
        known = self.map in ("", ALL) or _MAP.fullmatch(self.map) is not None
        self.require("map", known, "as in 3:1-5:2, reader:source")
        pairs = self._pairs()
        self.require("map", len({reader for reader, _ in pairs}) == len(pairs), "such that a layer reads one other")
        self.require("map", all(source < reader for reader, source in pairs), "such that a layer reads an earlier one")

    def layer_map(self, shape: EncodingShape) -> tuple[int, ...]:
        """The map with its chains followed; StrategyError if there is none, or it names layers that the model lacks."""
        if not self.map:
            raise StrategyError(
                f"{self.name} needs a map of layers: find one with kvwise calibrate kvsharer --model {shape.model}"
            )
        reads = list(range(shape.num_layers))
        for reader, source in sorted(self._pairs()):
            if reader >= shape.num_layers:
                raise StrategyError(
                    f"{self}: {shape.model} has layers 0 to {shape.num_layers - 1} and no layer {reader}; calibrate a "
                    f"map for it with kvwise calibrate kvsharer --model {shape.model}"
                )
            reads[reader] = reads[source]
        return tuple(reads)

    def _pairs(self) -> list[tuple[int, int]]:
        """(reader, source) pairs."""
        found = [pair.split(":") for pair in self.map.split("-")] if self.map not in ("", ALL) else []
        return [(int(reader), int(source)) for reader, source in found]


def sharing(reads: Sequence[int]) -> KVSharer:
    """The method whose `layer_map` is `reads`."""
    return KVSharer("-".join(f"{layer}:{source}" for layer, source in enumerate(reads) if layer != source) or ALL)
