"""Who runs in the next step, and with how many tokens: decode first, then prefill, then what loading leaves over."""

from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kvwise.cache.manager import CacheManager, Match
from kvwise.core.clock import Clock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import InvariantError
from kvwise.engine.hierarchy.loads import Loads
from kvwise.engine.hierarchy.storing import Storing
from kvwise.engine.placement.base import Placement, ReadsInStrides
from kvwise.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence of a step and how many of its pending tokens are computed."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one can be sampled."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    """First come, first served within a priority, under a budget of tokens and sequences a step.

    A request holds memory for its whole prompt (or for what is kept of it and a stride) from its admission on, so a
    prefill never stalls half-way. When a running request cannot grow, the latest arrival is preempted: its memory is
    released and it is computed again.
    """

    def __init__(
        self, cache: CacheManager, placement: Placement, config: EngineConfig, clock: Clock,
        loads: Loads | None = None, storing: Storing | None = None,
    ) -> None:  # fmt: skip
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.max_num_seqs = config.max_num_seqs
        self._cache = cache
        self._placement = placement
        self._config = config
        self._clock = clock
        self._loads = loads
        self._storing = storing
        self._stuck_since: float | None = None
        self._failures: list[tuple[Sequence, Exception]] = []  # requests that could not be admitted, and why

    def add(self, sequence: Sequence) -> None:
        """Queue a new request, behind all that are as urgent."""
        index = len(self.waiting)
        while index and self.waiting[index - 1].priority > sequence.priority:
            index -= 1
        self.waiting.insert(index, sequence)

    def _put_first(self, sequence: Sequence) -> None:
        """Queue a request before all that are as urgent."""
        ahead = (i for i, other in enumerate(self.waiting) if other.priority >= sequence.priority)
        self.waiting.insert(next(ahead, len(self.waiting)), sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the sequences of the next step and reserve their memory."""
        chosen = self._chosen()
        if chosen:
            self._stuck_since = None
        return chosen

    def _chosen(self) -> list[Scheduled]:
        if self._loads is not None:
            self._loads.advance()
        num_preempted = self.num_preemptions
        chosen = [Scheduled(s, 1) for s in self._growing()]
        budget = self._config.max_num_batched_tokens - len(chosen)
        for sequence in self.running:
            if sequence.phase is Phase.PREFILL and budget > 0 and not self._is_loading(sequence):
                chosen.append(self._chunk(sequence, budget))
                budget -= chosen[-1].num_tokens
        if self.num_preemptions == num_preempted:
            admitted = self._admitted(budget)
            chosen += admitted
            budget -= sum(item.num_tokens for item in admitted)
        return chosen + self._left_over(budget)

    def look_ahead(self) -> None:
        """For loading methods that look at the queue: blocks of the first that wait come nearer, of others may go."""
        if self._loads is None or not (count := self._loads.method.look_ahead):
            return
        first = [s for s in islice(self.waiting, count) if s.keys is not None]
        self._loads.hierarchy.look_ahead({f"{s.request_id}/{s.index}": s.keys.chain for s in first if s.keys})

    def take_failures(self) -> list[tuple[Sequence, Exception]]:
        """Requests for whose admission something raised since the last call; they must be ended."""
        failures, self._failures = self._failures, []
        return failures

    def wait_for_blocks(self) -> bool:
        """Nothing runs for lack of blocks: wait a moment for some that a transfer holds.

        False: none does, or not one has come back within the tiers' deadline.
        """
        if self._loads is None or not (self._loads.num_leaving or self._loads.hierarchy.num_held):
            self._stuck_since = None
            return False
        now = self._clock.now()
        self._stuck_since = now if self._stuck_since is None else self._stuck_since
        if now - self._stuck_since > self._config.tier_deadline_s:
            self._stuck_since = None
            return False
        self._loads.wait_for_blocks()
        return True

    def _is_loading(self, sequence: Sequence) -> bool:
        return self._loads is not None and self._loads.of(sequence) is not None

    def _left_over(self, budget: int) -> list[Scheduled]:
        """Prompts that are loaded too get what is left (Cake, arXiv 2410.03065: its own prefill comes last)."""
        if self._loads is None:
            return []
        chosen = []
        for sequence in [s for s in self.running if self._is_loading(s)]:
            if budget > 0:
                allowed = self._loads.limit(sequence, self._chunk(sequence, budget).num_tokens)
                chosen += [Scheduled(sequence, allowed)] if allowed else []
                budget -= allowed
        return chosen

    def _chunk(self, sequence: Sequence, budget: int) -> Scheduled:
        placement, chunked = self._placement, self._config.enable_chunked_prefill
        most = placement.num_next(sequence) if isinstance(placement, ReadsInStrides) else sequence.num_pending
        return Scheduled(sequence, min(most, budget) if chunked else most)

    def _growing(self) -> list[Sequence]:
        """The decoding sequences that have room for one more token; others are preempted until they have."""
        decoding = [s for s in self.running if s.phase is Phase.DECODE]
        in_blocks = [s for s in decoding if not s.settled]
        rows = np.array([s.row for s in in_blocks], dtype=np.int64)
        lengths = np.array([len(s.tokens) for s in in_blocks], dtype=np.int64)
        grown = self._cache.reserve_many(rows, lengths)
        stuck = [s for s, ok in zip(in_blocks, grown, strict=True) if not ok]
        stuck += [s for s in decoding if s.settled and not self._placement.grow(s)]
        for sequence in stuck:
            while sequence.phase is Phase.DECODE and not self._grow(sequence):
                self.preempt(self.latest() or sequence)
        return [s for s in decoding if s.phase is Phase.DECODE]

    def _grow(self, sequence: Sequence) -> bool:
        if sequence.settled:
            return self._placement.grow(sequence)
        assert sequence.row is not None
        return self._cache.reserve(sequence.row, len(sequence.tokens))

    def _admitted(self, budget: int) -> list[Scheduled]:
        """Admit from the queue, in order, while there is room and budget; their memory is reserved."""
        admitted: list[Scheduled] = []
        held: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            try:
                match = self._match(sequence)
                may_start = budget > 0 or self._would_load(sequence, match)
                if may_start and match.num_pending:
                    held.append(sequence)  # a running prefill is about to publish its next block: wait for it
                    continue
                if not may_start or not self._admit(sequence, match):
                    self.waiting.appendleft(sequence)
                    break
            except InvariantError:
                raise
            except Exception as error:  # no memory for what it needs, or a method's code: only this request fails
                self._failures.append((sequence, error))
                continue
            if not self._is_loading(sequence):
                admitted.append(self._chunk(sequence, budget))
                budget -= admitted[-1].num_tokens
        self.waiting.extendleft(reversed(held))
        return admitted

    def _would_load(self, sequence: Sequence, match: Match) -> bool:
        """Bytes can be on their way while there is no budget to compute."""
        return self._loads is not None and bool(self._loads.find(sequence, match.num_tokens, self._num_last(sequence)))

    def _match(self, sequence: Sequence) -> Match:
        assert sequence.keys is not None
        return self._cache.match(sequence.keys, len(sequence.tokens), self._num_last(sequence))

    def _num_last(self, sequence: Sequence) -> int:
        """Of its last tokens, how many must be computed: one, and the prompt's rows that a method looks at."""
        observed = self._placement.observed_rows(sequence)
        return max(1, observed + len(sequence.tokens) - sequence.num_prompt) if observed else 1

    def _admit(self, sequence: Sequence, match: Match) -> bool:
        assert sequence.keys is not None
        if not self._placement.admit(sequence):
            return False
        # Looked up before the row announces its blocks, and before making room pushes anything out.
        stored = [] if self._loads is None else self._loads.find(sequence, match.num_tokens, self._num_last(sequence))
        in_strides = isinstance(self._placement, ReadsInStrides)
        num_tokens = 0 if in_strides else len(sequence.tokens)  # those pages are asked for by the placement
        row = self._cache.admit_with_room(match, sequence.keys, num_tokens, terms=sequence.terms)
        if row is None:
            self._placement.release(sequence)
            return False
        sequence.row = row
        if isinstance(self._placement, ReadsInStrides) and not self._placement.start(sequence):
            self._placement.release(sequence)
            self._cache.release(row)
            sequence.row = None
            return False
        sequence.settled = in_strides
        sequence.num_computed = match.num_tokens
        sequence.phase = Phase.PREFILL
        sequence.num_offered = 0
        self._note_admission(sequence, match)
        self.running.append(sequence)
        if self._storing is not None:
            self._storing.offer_full([sequence])  # blocks it found on the device may be due to go down by now
        if self._loads is not None:
            self._loads.begin(sequence, stored)
        return True

    def _note_admission(self, sequence: Sequence, match: Match) -> None:
        metrics = sequence.metrics
        sequence.attestation.tokens_reused += match.num_tokens
        if metrics.first_scheduled is None:
            metrics.first_scheduled = self._clock.now()
            metrics.num_cached_tokens = match.num_tokens
            metrics.num_keyed_tokens = 0 if sequence.keys is None else len(sequence.keys) * self._config.block_size
            metrics.miss = str(match.miss)

    def latest(self, besides: Sequence | None = None) -> Sequence | None:
        """The least urgent running sequence, of these the last to arrive: the first to give way; None: no other."""
        others = [(s.priority, s.metrics.arrival, i, s) for i, s in enumerate(self.running) if s is not besides]
        return max(others, key=lambda other: other[:3])[3] if others else None

    def preempt(self, sequence: Sequence) -> None:
        """Release a running sequence's memory and put it first in the queue; its tokens so far are kept."""
        self.release(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_computed = 0
        sequence.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self._put_first(sequence)

    def start_over(self, sequence: Sequence) -> None:
        """What was loaded for a running request turned out bad after it was used: it is computed from the start."""
        sequence.declines_loading = True
        self.preempt(sequence)

    def offer_rest(self, sequence: Sequence) -> None:
        """A sequence is about to let go of its blocks, or to rearrange them: store what is not stored yet."""
        if self._storing is not None:
            self._storing.offer_rest(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give back all memory of a running sequence and take it off the running list."""
        self.offer_rest(sequence)
        if self._loads is not None:
            self._loads.cancel(sequence)
        self._placement.release(sequence)
        sequence.settled = False
        if sequence.row is not None:
            self._cache.release(sequence.row)
            sequence.row = None
        if sequence in self.running:
            self.running.remove(sequence)
