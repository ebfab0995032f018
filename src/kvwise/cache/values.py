"""What the manager hands out: matches, moves, usage."""

from dataclasses import dataclass
from typing import NamedTuple

from kvwise.cache.misses import Miss
from kvwise.policies.base import Blocks


class Move(NamedTuple):
    """Copy the bytes of a whole block before anybody writes the target."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest resident run at the start of a prompt, and why it goes no further.

    `blocks` int64 [n]; `num_tokens` = n * block_size; `num_pending`: tokens right behind them that a live
    sequence is computing now (waiting for it may be cheaper than computing them twice); `generation` lets
    `admit` tell whether the run still stands.
    """

    blocks: Blocks
    num_tokens: int
    num_pending: int
    miss: Miss
    generation: int


class Withdrawn(NamedTuple):
    """What became of withdrawn keys' blocks: `blocks` int64 [n] were nobody's and are held now, so that their bytes can
    be overwritten before `let_go` frees them; `kept` others are private to running sequences, and free when those end.
    """

    blocks: Blocks
    kept: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the blocks are: `num_blocks` = free + cached + referenced + broken.

    Cached blocks are published and unreferenced; they count as used pages, though most can be evicted at
    once. `num_pages_used`: pages that hold something: all of a cached or referenced block's, the owned ones
    of a broken block. `num_pages_loose`: the other pages of broken blocks, which only page tables can use.
    `num_packed`, `num_packed_used`, `num_packed_loose`: the same for packed pages, of blocks that are broken into
    those; such blocks count in no figure of pages but `num_pages`. `num_held`: referenced blocks that a transfer under
    way holds.
    """

    num_blocks: int
    num_free: int
    num_cached: int
    num_referenced: int
    num_broken: int
    num_pages: int
    num_pages_used: int
    num_pages_loose: int
    num_packed: int
    num_packed_used: int
    num_packed_loose: int
    num_pinned: int
    num_sequences: int
    num_held: int

    @property
    def num_pages_held(self) -> int:
        """Pages that live sequences hold: used ones without the merely cached blocks."""
        return self.num_pages_used - self.num_cached * (self.num_pages // self.num_blocks)

    @property
    def num_packed_held(self) -> int:
        """Packed pages that live sequences hold: all that are used, for none is ever merely cached."""
        return self.num_packed_used
