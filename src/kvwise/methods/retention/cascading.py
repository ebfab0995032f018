"""Cascading: the first tokens stay, and behind a window of the latest come sparser and sparser ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvwise.core.method import Trait
from kvwise.methods.retention.cascades import Cascades, Places, Queue, cut, lay_out, queues_of
from kvwise.methods.retention.strided import Floats, Ints, Layout, Moves, Strided, StrideView

if TYPE_CHECKING:
    from torch import Tensor

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
    columns: ClassVar[tuple[str, ...]] = ("score",)

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
        return lay_out(places, empty, 0, turning=self.turns)

    def _places(self, num_prompt_tokens: int) -> Places:
        capacity = self.capacity(num_prompt_tokens)
        assert capacity is not None
        return cut(self.sinks, capacity - self.sinks, self.cascades, aligned=self.turns)

    def updated(self, view: StrideView) -> Mapping[str, Tensor]:
        """One step of the average for each row of the stride, in one."""
        received = view.mass / view.group
        if self.homogeneous:
            received = received.mean(2, keepdim=True)
        kept = self.beta ** view.num_rows[:, None, None, None].float()
        return {"score": kept * view.columns["score"] + (1 - self.beta) * received}

    def arrange(self, layout: Layout, num_new: int, columns: Mapping[str, Floats]) -> Moves:
        """The tokens of the stride enter one by one."""
        assert isinstance(layout, Cascades)
        places, queues = layout.places, queues_of(layout)
        num_layers, num_heads, num_slots = columns["score"].shape
        score = columns["score"].reshape(-1, num_slots)
        own = np.arange(max(num_slots, places.num_slots))
        held = np.tile(own, (len(score), 1))  # the slot that each slot's token was in before
        for number in range(num_new):
            self._enter(layout.num_tokens + number, layout.end + number, queues, held, score)
        after = lay_out(places, queues, layout.num_tokens + num_new, turning=self.turns)
        target = np.flatnonzero((held != own).any(0))
        return Moves(after, target, held[:, target].reshape(num_layers, num_heads, -1))

    def _enter(self, position: int, slot: int, queues: list[Queue], held: Ints, score: Floats) -> None:
        """Token `position`, in `slot`, finds its place: `held` [n, S] of heads whose slots score [n, S]."""
        rows, comer = np.arange(len(held)), np.full(len(held), slot)
        if position < self.sinks:
            held[:, position] = comer
            return
        since = position - self.sinks
        filling = self.eager_fill and since < sum(queue.size for queue in queues)
        for number, queue in enumerate(queues):
            if queue.stored and since % 2**number and not filling:
                rival = held[:, queue.newest if self.mode == "paper" else queue.oldest]
                wins = score[rows, comer] >= score[rows, rival]
                held[wins, queue.newest] = comer[wins]
                return
            if not queue.is_full:
                held[:, queue.push()] = comer
                return
            leaver = held[:, queue.oldest].copy()
            held[:, queue.push()] = comer
            comer = leaver
