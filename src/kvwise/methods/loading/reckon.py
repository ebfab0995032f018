"""What is left of a load, and how long it should take: to load it, and to compute it instead."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvwise.methods.loading.base import Outlook, Progress

Blocks = npt.NDArray[np.int64]


def missing(outlook: Outlook, progress: Progress) -> Blocks:
    """Blocks, ascending, that may still be loaded: not computed, not arrived, not failed."""
    open_ = ~(progress.arrived | progress.failed)
    open_[: max(0, progress.computed - outlook.first)] = False
    return np.flatnonzero(open_) + outlook.first


def first_run(outlook: Outlook, blocks: Blocks, most: int) -> tuple[int, int]:
    """The leading blocks [start, stop) that follow each other and lie in one tier, at most so many."""
    start = stop = int(blocks[0])
    tier = outlook.tiers[start - outlook.first]
    for block in blocks[:most].tolist():
        if block != stop or outlook.tiers[block - outlook.first] != tier:
            break
        stop += 1
    return start, stop


def last_run(outlook: Outlook, blocks: Blocks, most: int) -> tuple[int, int]:
    """The trailing blocks [start, stop) of which the same holds."""
    start = stop = int(blocks[-1]) + 1
    tier = outlook.tiers[stop - 1 - outlook.first]
    for block in blocks[: -most - 1 : -1].tolist():
        if block != start - 1 or outlook.tiers[block - outlook.first] != tier:
            break
        start -= 1
    return start, stop


@dataclass(frozen=True, slots=True)
class Reckoning:
    """Expectations at one moment: what this load has measured, in the shape of what the outlook guesses.

    A guess that is wrong by a constant factor is thus mended by the first chunk that arrives and by the first step
    that computes. None: nobody knows yet.
    """

    outlook: Outlook
    progress: Progress

    def transfer_s(self, tier: str, num_bytes: float) -> float | None:
        """Seconds of one transfer. What another tier's chunk took tells nothing about this one."""
        guess, known = self.outlook.seconds_to_load(tier, round(num_bytes)), self.progress
        if not known.last_bytes or known.last_tier not in (None, tier):
            return guess
        return _mended(
            guess, self.outlook.seconds_to_load(tier, known.last_bytes), num_bytes, known.last_bytes, known.last_s
        )

    def load_s(self, start: int, stop: int) -> float | None:
        """Seconds to load blocks [start, stop) of one tier in one transfer, with those ahead if it is the first."""
        outlook = self.outlook
        tier = outlook.tiers[start - outlook.first]
        seconds = self.transfer_s(tier, sum(outlook.num_bytes[start - outlook.first : stop - outlook.first]))
        return None if seconds is None else seconds + self._queued_s(tier)

    def rest_s(self, blocks: Blocks, most: int) -> float | None:
        """Seconds until `blocks` are loaded, in chunks of at most so many, counting from now."""
        total = 0.0
        for tier, (count, num_bytes) in self._by_tier(blocks).items():
            num_chunks = -(-count // most)
            seconds = self.transfer_s(tier, num_bytes / num_chunks)
            if seconds is None:
                return None
            total += num_chunks * seconds + self._queued_s(tier)
        # A chunk under way is that far; one that is late will, for all we know, take as long again.
        return max(total - self.progress.waited_s, self.progress.waited_s)

    def compute_s(self, start: int, stop: int) -> float | None:
        """Seconds to compute blocks [start, stop)."""
        size, known = self.outlook.block_size, self.progress
        tokens = range(start * size, min(stop * size, self.outlook.num_tokens))
        guess = self.outlook.seconds_to_compute(tokens.start, tokens.stop)
        if not known.last_tokens:
            return guess
        done = min(known.computed * size, self.outlook.num_tokens)
        usual = self.outlook.seconds_to_compute(max(0, done - known.last_tokens), done)
        return _mended(guess, usual, len(tokens), known.last_tokens, known.last_step_s)

    def step_s(self) -> float | None:
        """Seconds of the next step that computes: as many tokens as the latest, but not past what has arrived."""
        outlook, computed = self.outlook, self.progress.computed
        num_blocks = -(-(self.progress.last_tokens or outlook.step_tokens) // outlook.block_size)
        ahead = self.progress.arrived[computed - outlook.first :]
        stop = computed + int(ahead.argmax()) if ahead.any() else outlook.stop
        return self.compute_s(computed, min(computed + num_blocks, stop))

    def _queued_s(self, tier: str) -> float:
        return 0.0 if self.progress.last_bytes else self.outlook.queued_s(tier)

    def _by_tier(self, blocks: Blocks) -> dict[str, tuple[int, int]]:
        """Number and bytes of `blocks` in each tier."""
        at = (blocks - self.outlook.first).tolist()
        tiers, sizes = self.outlook.tiers, self.outlook.num_bytes
        if at[-1] - at[0] + 1 == len(at):  # before each step, and of thousands of blocks: no loop if it can be helped
            span = slice(at[0], at[-1] + 1)
            if len(set(tiers[span])) == 1:
                return {tiers[at[0]]: (len(at), sum(sizes[span]))}
        found: dict[str, tuple[int, int]] = {}
        for index in at:
            count, num_bytes = found.get(tiers[index], (0, 0))
            found[tiers[index]] = (count + 1, num_bytes + sizes[index])
        return found


def _mended(guess: float | None, usual: float | None, amount: float, measured: float, seconds: float) -> float:
    """`seconds` were measured for the amount `measured`, for which the guess was `usual`: seconds for `amount`."""
    if guess is None or not usual:
        return seconds * amount / measured
    return guess * seconds / usual
