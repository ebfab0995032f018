"""Cascading: the first tokens stay, and behind a window of the latest come sparser and sparser ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvwise.core.method import Trait
from kvwise.methods.retention.cascades import Cascades, Entry, Places, Queue, cut, lay_out, queues_of
from kvwise.methods.retention.strided import Floats, Ints, Layout, Moves, Strided

MODES = ("paper", "released")
POSITIONS = ("cache", "original")


@dataclass(frozen=True)
class Cascading(Strided):
    """Cascading KV Cache, arXiv 2406.17808 section 3.

    The `budget` share of the prompt is `sinks` first tokens, which stay, and `cascades` buffers of equal size, each a
    queue. Every token enters buffer 0. Buffer i takes one of 2^i tokens: what it takes pushes out its oldest, which
    goes on to buffer i + 1 (out of the last it is gone); what it does not take replaces its newest if it scores no
    less, else it is gone. With `eager_fill` all is taken until all buffers are full.

    A token's score is an average of the attention it received that forgets: s = `beta` s + (1 - `beta`) a with each
    row, a the mean over the query heads of the layer (`homogeneous`; else of its KV head). A prompt is read in strides
    of `stride` tokens, each of which attends to what is kept and to itself; scores decide when a stride has been read.

    `positions=cache`: keys count as if the kept tokens were the whole text, position 0 to their number; `original`:
    they keep the positions they had. `mode=released` compares with the score of a buffer's *oldest* token, as the
    authors' slow reference does, and replaces the newest.

    Buffers differ in size by up to an eighth, so that they begin where pages do. A request that is preempted reads its
    output again in strides, by which scores are not asked as often.
    """

    budget: float = 0.2
    sinks: int = 4
    cascades: int = 4
    beta: float = 0.9999
    stride: int = 1024
    positions: str = "cache"
    homogeneous: bool = True
    eager_fill: bool = True
    mode: str = "paper"

    name: ClassVar[str] = "cascading"
    idea: ClassVar[str] = "keep the first tokens, the latest, and ever fewer of the older ones, at constant memory"
    paper: ClassVar[str] = "Cascading KV Cache, arXiv 2406.17808"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.NEEDS_EVERY_ROW, Trait.OWNS_PAGES, Trait.REPOSITIONS, Trait.PRIVATE}
    )

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("sinks", self.sinks >= 0, "0 or more")
        self.require("cascades", self.cascades >= 1, "at least 1")
        self.require("beta", 0 < self.beta < 1, "above 0, below 1")
        self.require("stride", self.stride >= 1, "at least 1")
        self.require("positions", self.positions in POSITIONS, f"one of {', '.join(POSITIONS)}")
        self.require("mode", self.mode in MODES, f"one of {', '.join(MODES)}")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    @property
    def strides(self) -> int | None:
        """As asked."""
        return self.stride

    @property
    def turns(self) -> bool:
        """Positions are those in the cache."""
        return self.positions == "cache"

    @property
    def row_decay(self) -> float:
        """The average forgets."""
        return self.beta

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """The share of the prompt, at least the sinks and a token in each buffer."""
        return max(self.sinks + self.cascades, int(num_prompt_tokens * self.budget)) if self.drops else None

    def num_slots(self, num_prompt_tokens: int) -> int:
        """Sinks, the gap behind them, and the buffers."""
        return self._places(num_prompt_tokens).num_slots

    def start(self, num_prompt_tokens: int) -> Layout:
        """All buffers are empty."""
        places = self._places(num_prompt_tokens)
        empty = [Queue(start, size, 0, 0) for start, size in zip(places.starts, places.sizes, strict=True)]
        return lay_out(places, empty, 0, np.zeros(places.num_slots, np.int64), turning=self.turns)

    def _places(self, num_prompt_tokens: int) -> Places:
        capacity = self.capacity(num_prompt_tokens)
        assert capacity is not None
        return cut(self.sinks, capacity - self.sinks, self.cascades, aligned=self.turns)

    def asks(self, layout: Layout, num_new: int) -> Ints:
        """All; for a single token only those that are compared."""
        assert isinstance(layout, Cascades)
        if num_new > 1:
            return np.arange(layout.end + num_new)
        queues = queues_of(layout)
        num_pushes, meets = self._way(layout.num_tokens, queues)
        return np.array([queues[num_pushes - 1].oldest, self._rival(queues[num_pushes])] if meets else [], np.int64)

    def arrange(self, layout: Layout, num_new: int, asked: Ints, mass: Floats) -> Moves:
        """The tokens of the stride enter one by one."""
        assert isinstance(layout, Cascades)
        places, queues = layout.places, queues_of(layout)
        num_layers = len(mass)
        received = mass.sum(1) if self.homogeneous else mass.reshape(num_layers * mass.shape[1], -1)
        score = np.empty((len(received), layout.end + num_new), np.float32)
        score[:, asked] = received
        entry = Entry(score, {}, layout.rotation_in(places.num_slots))
        for number in range(num_new):
            self._enter(layout.num_tokens + number, layout.end + number, queues, entry)
        after = lay_out(places, queues, layout.num_tokens + num_new, entry.rotation, turning=self.turns)
        target, source = entry.moves()
        return Moves(after, target, source.reshape(num_layers, -1, len(target)))

    def _enter(self, position: int, slot: int, queues: list[Queue], entry: Entry) -> None:
        """Token `position`, in `slot`, finds its place."""
        comer: int | Ints = slot
        if position < self.sinks:
            entry.put(position, comer, position)
            return
        num_pushes, meets = self._way(position, queues)
        for queue in queues[:num_pushes]:
            leaver = entry.at(queue.oldest)
            entry.put(queue.push(), comer, self.sinks + queue.taken - 1)
            comer = leaver
        if meets:
            queue = queues[num_pushes]
            entry.replace(queue.newest, comer, entry.at(self._rival(queue)))

    def _way(self, position: int, queues: list[Queue]) -> tuple[int, bool]:
        """How many queues take one more, each what the one before pushed out; whether the next compares the last."""
        since = position - self.sinks
        if since < 0:
            return 0, False
        filling = self.eager_fill and since < sum(queue.size for queue in queues)
        for number, queue in enumerate(queues):
            if queue.stored and since % 2**number and not filling:
                return number, True
            if not queue.is_full:
                return number + 1, False
        return len(queues), False

    def _rival(self, queue: Queue) -> int:
        return queue.newest if self.mode == "paper" else queue.oldest
