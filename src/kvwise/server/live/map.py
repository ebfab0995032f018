"""The map of a pool's blocks as text: runs of one holder, so that many blocks cost little to send.

A run is a letter, `a` for `Holder(0)` and so on, and how many blocks it has if there is more than one: `a120bf3`. In a
change, `.` stands for blocks that are as they were.
"""

import numpy as np
import numpy.typing as npt

_A, _SAME = ord("a"), ord(".")
_MOST_RUNS = 20_000  # beyond that a letter for each block is as short, and much faster to write

Holders = npt.NDArray[np.uint8]


def encode(held: Holders) -> str:
    """All blocks."""
    return _runs(held + np.uint8(_A))


def encode_change(before: Holders, after: Holders) -> str:
    """What has changed between two maps of one length; empty if nothing has."""
    if np.array_equal(before, after):
        return ""
    return _runs(np.where(before == after, np.uint8(_SAME), after + np.uint8(_A)))


def _runs(letters: npt.NDArray[np.uint8]) -> str:
    starts = np.flatnonzero(np.diff(letters, prepend=np.uint8(0)))
    if len(starts) > _MOST_RUNS:
        return letters.tobytes().decode("ascii")
    lengths = np.diff(starts, append=len(letters))
    kinds = letters[starts].tobytes().decode("ascii")
    return "".join(k if n == 1 else f"{k}{n}" for k, n in zip(kinds, lengths.tolist(), strict=True))
