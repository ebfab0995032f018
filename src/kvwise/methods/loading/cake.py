"""Cake: compute a prefix from its start while it is loaded from its end, until the two meet."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress
from kvwise.methods.loading.reckon import Blocks, Reckoning, last_run, missing

DOUBT = 10.0  # how far a guess that this load has not measured itself may be off


@dataclass(frozen=True)
class Cake(Loading):
    """Cake, arXiv 2410.03065 section 3: both ends at once, the meeting discovered after every step, not predicted.

    I/O takes chunks of `chunk` tokens from the last stored block backward; computing takes what the step's budget
    leaves, from the first block forward. Computing a token costs more the further back it stands and loading it does
    not, so each side does what is cheap for it. Neither side ever waits for the other, hence the time to have the
    prefix is at most that of the quicker side alone plus what was begun last (one step or one chunk).

    `escape` adds three exceptions to the paper's rule, which loses 20 % to plain loading in its own Table 6, where
    little of the device is free. None lets a wrong guess starve a side: guesses alone decide only if one side should
    be so much quicker that being `DOUBT` times off would not matter, and while nothing is known both sides run.

    * *Computing waits* when one more step would end after the rest should have been loaded.
    * *Loading ends* when the next chunk should arrive after everything is computed. (Smaller chunks near the meeting
      were tried: they gain nothing, and on a link with latency they lose.)
    * *Nothing is loaded* when that holds for the first chunk, and loading everything would take far longer still.
    """

    codec: str = "raw"
    chunk: int = 128
    escape: bool = True

    name: ClassVar[str] = "cake"
    idea: ClassVar[str] = "load from the end, compute from the start, until they meet"
    paper: ClassVar[str] = "Cake, arXiv 2410.03065"

    def __post_init__(self) -> None:
        self.require_codec()
        self.require("chunk", self.chunk >= 1, "at least 1")

    def decide(self, outlook: Outlook) -> Decision:
        """Both, unless an exception holds at once."""
        if outlook.stop <= outlook.first:
            return Decision.COMPUTE
        if not self.escape:
            return Decision.BOTH
        none = np.zeros(outlook.stop - outlook.first, np.bool_)
        start = Reckoning(outlook, Progress(outlook.first, none, none))
        left = missing(outlook, start.progress)
        if self._waits(start, left):
            return Decision.LOAD
        return Decision.COMPUTE if self._comes_too_late(start, left) else Decision.BOTH

    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """The last blocks that are still wanted, unless computing is done sooner."""
        left = missing(outlook, progress)
        if not len(left):
            return None
        start, stop = last_run(outlook, left, self._most(outlook))
        if self.escape and progress.last_bytes and progress.last_tokens:  # each side has had its fair attempt
            now = Reckoning(outlook, progress)
            chunk_s, all_s = now.load_s(start, stop), now.compute_s(progress.computed, stop)
            if chunk_s is not None and all_s is not None and chunk_s > all_s:
                return None
        return Chunk(start, stop)

    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Yes, unless the rest should be loaded before a step ends."""
        left = missing(outlook, progress)
        if not self.escape or not progress.loading or not len(left):
            return True
        return not self._waits(Reckoning(outlook, progress), left)

    def _most(self, outlook: Outlook) -> int:
        return max(1, self.chunk // outlook.block_size)

    def _waits(self, now: Reckoning, left: Blocks) -> bool:
        """Whether blocks `left` should all be loaded before one more step of computing ends."""
        outlook, progress = now.outlook, now.progress
        if left[0] != progress.computed:
            return False  # that one failed: it must be computed anyway
        step_s, rest_s = now.step_s(), now.rest_s(left, self._most(outlook))
        if step_s is None or rest_s is None or step_s <= rest_s:
            return False
        if progress.last_tokens:
            return True
        # No step was measured. Were computing DOUBT times quicker than guessed, waiting would still cost no more than
        # a step; and as it is guessed, computing meanwhile could save a tenth at most.
        all_s = now.compute_s(outlook.first, outlook.stop)
        return all_s is not None and progress.elapsed_s + rest_s <= (all_s + step_s) / DOUBT

    def _comes_too_late(self, now: Reckoning, left: Blocks) -> bool:
        """Whether a first chunk should arrive after everything is computed, and loading all would take far longer."""
        chunk_s = now.load_s(*last_run(now.outlook, left, self._most(now.outlook)))
        rest_s = now.rest_s(left, self._most(now.outlook))
        all_s = now.compute_s(now.outlook.first, now.outlook.stop)
        if chunk_s is None or rest_s is None or all_s is None:
            return False
        # Both guesses may be off, in opposite directions.
        return chunk_s > all_s and chunk_s + rest_s >= DOUBT * DOUBT * all_s
