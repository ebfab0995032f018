"""Entries of a tier's book, and the answer to a reservation."""

from typing import NamedTuple

from kvwise.cache.terms import NO_LIMIT, Terms


class Entry(NamedTuple):
    """A block at rest: its key (32 bytes), the bytes it takes, its index in its chain, and its terms as stored."""

    key: bytes
    num_bytes: int
    depth: int = 0
    terms: Terms = NO_LIMIT


class Reservation(NamedTuple):
    """Which entries may be written now (bool each), and what left for them: the caller deletes those bytes.

    `victims` left for lack of room or quota, first to leave first, and may go to the next tier; `expired` were due and
    may not.
    """

    granted: list[bool]
    victims: list[Entry]
    expired: list[Entry]
