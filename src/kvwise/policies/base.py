"""The seam of replacement policies: the manager owns mechanics, a policy owns only the order of leaving."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

# numpy takes int64 indices as they are and converts int32 ones, at ten times the cost of a small look-up.
Blocks = npt.NDArray[np.int64]
Tags = npt.NDArray[np.uint64]


class ReplacementPolicy(Protocol):
    """Ranks the blocks of one tier; a block is named by its id in `0 .. num_blocks-1`.

    Life of a block as the policy hears it::

        insert -> (offer <-> hold, touch)* -> victims | remove

    * *resident*: between `insert` and `victims`/`remove`. A resident block starts held.
    * *held*: referenced or pinned; it must not be a victim. *Offered*: it may be.

    The manager promises: blocks of one call are distinct; `insert` only of absent, `offer` and `touch` only of held,
    `hold` only of offered, `remove` only of resident blocks. The policy promises: `victims` names only offered blocks,
    as many as asked while there are as many, and `len()` counts the offered ones exactly. Every call is at most
    O(blocks named) amortised (a heap may add a logarithm), and keeps its state in arrays: no object per block where an
    array does.

    `newest_last`: while nothing is touched, every new block leaves after all that were resident when it came. So a run
    of insertions may choose its victims in one call, with the same outcome as one by one.
    """

    name: str
    newest_last: bool

    def __init__(self, num_blocks: int) -> None:
        """Make an empty policy over `num_blocks` block ids."""

    def __len__(self) -> int:
        """Count the offered blocks."""
        ...

    def insert(self, blocks: Blocks, tags: Tags, depths: Blocks) -> None:
        """New content became resident in `blocks`, held.

        `tags` are 64-bit fingerprints of the content, stable across residencies (ghost lists remember them);
        `depths` are positions in the chain of the prompt, in blocks (cost to compute again grows with it).
        """

    def touch(self, blocks: Blocks) -> None:
        """A new request hit the content of `blocks`, held by now."""

    def hold(self, blocks: Blocks) -> None:
        """`blocks` were referenced or pinned: no victims until offered again."""

    def offer(self, blocks: Blocks) -> None:
        """The last reference or pin of `blocks` went; among equals the first named leaves first."""

    def remove(self, blocks: Blocks) -> None:
        """The content of `blocks`, held or offered, left for another reason (expired, withdrawn, cleared)."""

    def victims(self, count: int) -> Blocks:
        """Choose up to `count` offered blocks, first to leave first; they are no longer resident."""
        ...
