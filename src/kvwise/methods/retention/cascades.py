"""Cascades: queues in fixed places behind the first tokens of a text, and how they fill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvwise.methods.retention.strided import Floats, Ints, Layout, Run

UNIT = 16  # slots of a page, commonly: queues that begin where pages do are read fastest


@dataclass(frozen=True, slots=True)
class Places:
    """Where the queues lie: number 0, which the next tokens follow, last. The first tokens are in front."""

    sinks: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Slots up to the end of queue 0, gaps included."""
        return self.starts[0] + self.sizes[0]


def cut(sinks: int, num_tokens: int, num_queues: int, *, aligned: bool) -> Places:
    """Share `num_tokens` among queues, of equal size or `aligned` to pages where that is an eighth or less of it."""
    unit = UNIT if aligned else 1
    while unit > 1 and 8 * unit * num_queues > num_tokens:
        unit //= 2
    each, more = divmod(num_tokens // unit, num_queues)
    later = [(each + (i <= more)) * unit for i in range(1, num_queues)]
    sizes = (num_tokens - sum(later), *later)
    first = -(-sinks // unit) * unit
    return Places(sinks, sizes, tuple(first + sum(sizes[i + 1 :]) for i in range(num_queues)))


@dataclass(frozen=True, slots=True)
class Cascades(Layout):
    """A layout of queues: how many tokens each holds, and how many it ever took."""

    places: Places
    stored: tuple[int, ...]
    taken: tuple[int, ...]

    def rotation_in(self, num_slots: int) -> Ints:
        """A copy of `rotation` for so many slots, 0 in those without a token."""
        rotation = np.zeros(num_slots, np.int64)
        rotation[: self.end] = self.rotation
        return rotation


@dataclass(slots=True)
class Queue:
    """A ring of `size` slots from `start` on."""

    start: int
    size: int
    stored: int
    taken: int

    @property
    def newest(self) -> int:
        """Slot of the token that came last."""
        return self.start + (self.taken - 1) % self.size

    @property
    def oldest(self) -> int:
        """Slot of the token that leaves next."""
        return self.start + (self.taken - self.stored) % self.size

    @property
    def is_full(self) -> bool:
        """Whether who comes pushes the oldest out."""
        return self.stored == self.size

    def push(self) -> int:
        """Take one more; its slot, the oldest's if the queue is full."""
        self.stored = min(self.stored + 1, self.size)
        self.taken += 1
        return self.newest


@dataclass(slots=True)
class Entry:
    """How tokens find their places in n heads that may decide differently.

    `score` [n, S] is of the slots that tokens were in before; `held` says from which of those a slot's new token comes,
    one slot for all heads or int64 [n]; `rotation` by which position the key in each slot is to be rotated.
    """

    score: Floats
    held: dict[int, int | Ints]
    rotation: Ints

    def at(self, slot: int) -> int | Ints:
        """Where the token came from that is in a slot now."""
        return self.held.get(slot, slot)

    def put(self, slot: int, comer: int | Ints, rotation: int) -> None:
        """A token from `comer` takes a slot."""
        self.held[slot] = comer
        self.rotation[slot] = rotation

    def replace(self, slot: int, comer: int | Ints, rival: int | Ints) -> None:
        """In heads where its score is no less than the rival's."""
        wins = self._scores(comer) >= self._scores(rival)
        if wins.any():
            self.held[slot] = np.where(wins, comer, self.at(slot))

    def moves(self) -> tuple[Ints, Ints]:
        """Slots [m] that have new tokens, and where these come from, [n, m]."""
        source = np.empty((len(self.score), len(self.held)), np.int64)
        for i, comer in enumerate(self.held.values()):
            source[:, i] = comer
        return np.array([*self.held], np.int64), source

    def _scores(self, slots: int | Ints) -> Floats:
        if isinstance(slots, int):
            return self.score[:, slots]
        found: Floats = self.score[np.arange(len(self.score)), slots]
        return found


def queues_of(layout: Cascades) -> list[Queue]:
    """The queues of a layout, to go on with."""
    places = layout.places
    return [Queue(*of) for of in zip(places.starts, places.sizes, layout.stored, layout.taken, strict=True)]


def lay_out(places: Places, queues: list[Queue], num_tokens: int, rotation: Ints, *, turning: bool) -> Cascades:
    """How the queues lie when `num_tokens` have come, and keys are rotated by `rotation` (longer than that is used).

    The k-th token of any queue is to be rotated by position `sinks` + k. In queue 0 that is its own, and as long as
    nothing has left, in all. A key is then rotated anew only when it changes queues; queries make up for the rest,
    which is the same for all tokens of a queue: the n-th last of the kept tokens is to lie n positions before the next.
    """
    sinks = min(places.sinks, num_tokens)
    end = places.starts[0] + queues[0].stored if num_tokens >= places.sinks else num_tokens
    behind = 0  # tokens kept of this queue and those behind it
    runs = []
    for queue in queues:
        behind += queue.stored
        if queue.stored:
            first = queue.taken - queue.stored
            runs.append(Run(queue.start, queue.stored, places.sinks + first + behind - num_tokens))
    if sinks:
        runs.append(Run(0, sinks, sinks + behind - num_tokens))
    return Cascades(
        num_tokens,
        _joined(runs[::-1], turning),
        end,
        rotation[:end],
        places,
        tuple(queue.stored for queue in queues),
        tuple(queue.taken for queue in queues),
    )


def _joined(runs: list[Run], turning: bool) -> tuple[Run, ...]:
    """Neighbours that queries meet in the same way are one run."""
    joined: list[Run] = []
    for run in runs:
        turn = run.turn if turning else 0
        last = joined[-1] if joined else None
        if last is not None and last.start + last.length == run.start and last.turn == turn:
            joined[-1] = Run(last.start, last.length + run.length, turn)
        else:
            joined.append(Run(run.start, run.length, turn))
    return tuple(joined)
