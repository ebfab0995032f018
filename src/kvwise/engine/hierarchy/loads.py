"""Requests whose KV is coming back: the scheduler's view of loading."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvwise.cache.manager import CacheManager
from kvwise.cache.misses import Miss, MissReason
from kvwise.core.clock import Clock
from kvwise.core.output import LoadReport
from kvwise.engine.hierarchy.drivers import Driver, ThreadDriver
from kvwise.engine.hierarchy.hierarchy import Hierarchy, StoredBlock
from kvwise.engine.hierarchy.load import Load, estimate_both
from kvwise.engine.sequence import Phase
from kvwise.engine.sequence import Sequence as Seq
from kvwise.methods.loading.base import Decision, Loading, Outlook
from kvwise.methods.loading.estimate import regret
from kvwise.tiers.arena import Arena
from kvwise.tiers.base import Fault, FaultKind

_log = logging.getLogger(__name__)
_WAIT_S = 0.02  # a step that can do nothing but wait for bytes looks again after this long


class Loads:
    """Starts a load when a request is admitted, tells the scheduler what it may compute, and skips what has arrived.

    All methods run on the engine's thread. A sequence with a load is in PREFILL; its device blocks are held until the
    load's I/O side has ended, also when the sequence has gone.
    """

    def __init__(
        self, method: Loading, hierarchy: Hierarchy, cache: CacheManager, arena: Arena, clock: Clock,
        *, step_tokens: int, deadline_s: float, driver: Driver | None = None,
    ) -> None:  # fmt: skip
        self.method = method
        self.hierarchy = hierarchy
        self.driver = driver or ThreadDriver(hierarchy.rates, clock)
        self._cache = cache
        self._arena = arena
        self._clock = clock
        self._step_tokens = step_tokens
        self._deadline_s = deadline_s
        self._size = arena.layout.block_size
        self._loads: dict[Seq, Load] = {}
        self._leaving: list[Load] = []  # their requests have gone, or need them no more; the I/O side is not done

    def __len__(self) -> int:
        return len(self._loads)

    def of(self, sequence: Seq) -> Load | None:
        """The load of a sequence, while it has one."""
        return self._loads.get(sequence)

    # -- admission ----------------------------------------------------------------------------------------------

    def find(self, sequence: Seq, num_on_device: int, num_last: int = 1) -> list[StoredBlock]:
        """The blocks right behind the first `num_on_device` tokens that are below; `num_last` are left to compute."""
        if sequence.declines_loading or sequence.keys is None or self.method.codec is None:
            return []
        limit = (len(sequence.tokens) - num_last) // self._size
        return self.hierarchy.find(sequence.keys.chain[num_on_device // self._size : limit])

    def begin(self, sequence: Seq, stored: Sequence[StoredBlock]) -> None:
        """Decide about the stored blocks of a sequence that was just admitted, and start their way back."""
        first = sequence.num_computed // self._size
        self._note_look_up(sequence, first, stored)
        if not stored:
            return
        outlook, rates = self._outlook(sequence, first, stored), self.hierarchy.rates
        decision = self._decide(outlook)
        if decision is Decision.COMPUTE:
            sequence.metrics.miss = str(Miss(MissReason.DECLINED, first))
            for tier in set(outlook.tiers):
                rates.link(tier).skipped()
            num_tokens = (outlook.stop - first) * self._size
            estimates = estimate_both(outlook)
            sequence.metrics.load = LoadReport(str(decision), 0, num_tokens, *estimates)
            return
        assert sequence.row is not None
        blocks = self._cache.hold(sequence.row, first, outlook.stop)
        until = [self.hierarchy.deadline(block) for block in stored]
        load = Load(self.method, outlook, decision, stored, blocks, self.hierarchy, self._clock, until)
        self._loads[sequence] = load
        self.driver.start(load)

    def _decide(self, outlook: Outlook) -> Decision:
        try:
            return self.method.decide(outlook)
        except Exception:  # a method is somebody's code: what it cannot decide about is computed
            _log.exception("%s cannot decide about a load", self.method.name)
            return Decision.COMPUTE

    def _note_look_up(self, sequence: Seq, first: int, stored: Sequence[StoredBlock]) -> None:
        keys = sequence.keys.chain if sequence.keys is not None else []
        limit = (len(sequence.tokens) - 1) // self._size
        self.hierarchy.note_use(keys[: first + len(stored)])
        for block in stored:
            tier = block.tiers[block.best]
            assert tier is not None
            self.hierarchy.tiers[tier].hits += 1
            for above in self.hierarchy.tiers[:tier]:
                above.misses += 1
        at = first + len(stored)
        if at < limit and at < len(keys):
            for tier_ in self.hierarchy.tiers:
                tier_.misses += 1
            miss = self.hierarchy.miss(keys[at], at)
            if miss.reason is not MissReason.NEVER_STORED or stored:
                sequence.metrics.miss = str(miss)
        elif stored:
            sequence.metrics.miss = str(Miss(MissReason.BLOCK_BOUNDARY, at))

    def _outlook(self, sequence: Seq, first: int, stored: Sequence[StoredBlock]) -> Outlook:
        names = [tier.name for tier in self.hierarchy.tiers]
        specs = self.hierarchy.codec.levels
        rates = self.hierarchy.rates
        return Outlook(
            block_size=self._size,
            first=first,
            stop=first + len(stored),
            num_tokens=len(sequence.tokens),
            step_tokens=self._step_tokens,
            tiers=[names[block.tiers[block.best] or 0] for block in stored],
            num_bytes=[block.num_bytes[block.best] for block in stored],
            seconds_to_compute=rates.prefill.seconds,
            seconds_to_load=lambda tier, num_bytes: rates.link(tier).seconds(num_bytes),
            queued_s=self.driver.queued_s,
            num_layers=self._arena.layout.num_layers,
            ttft_target_s=sequence.ttft_target_s,
            levels=[specs] * len(stored),
            level_bytes=[
                # A level that has left is replaced by the best there is, as the load will do.
                [
                    n if t is not None else block.num_bytes[block.best]
                    for n, t in zip(block.num_bytes, block.tiers, strict=True)
                ]
                for block in stored
            ],
        )

    # -- each step ----------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Before a step: skip what has arrived, give up what takes too long, forget what is done."""
        self.driver.poll()
        for sequence, load in list(self._loads.items()):
            self._skip(sequence, load)
            late = self._clock.now() - load.last_progress > self._deadline_s
            if late and not load.is_over and not load.is_stopped and sequence in self._loads:
                self._abandon(load)
        self._free_leaving()

    def _free_leaving(self) -> None:
        for load in [load for load in self._leaving if load.is_over]:
            self._leaving.remove(load)
            self._cache.let_go(load.blocks)

    def _skip(self, sequence: Seq, load: Load) -> None:
        if load.method.by_layer:
            end = load.end_block if load.all_layers() else sequence.num_computed // self._size
        else:
            end = load.arrived_until(sequence.num_computed // self._size)
        if end * self._size > sequence.num_computed:
            self._take(sequence, load, end)
        if load.broken is not None:
            return
        if sequence.num_computed >= load.outlook.stop * self._size or (load.is_over and self._nothing_left(load)):
            self._finish(sequence, load)

    def _nothing_left(self, load: Load) -> bool:
        """Whether no arrived block lies ahead: what remains is plain prefill."""
        first = load.outlook.first
        return not any(load.has_arrived(b) for b in range(max(load.progress().computed, first), load.outlook.stop))

    def _take(self, sequence: Seq, load: Load, end: int) -> None:
        """Blocks up to `end` came back: they count as computed, and are known to others from now on."""
        assert sequence.row is not None
        start = sequence.num_computed // self._size
        now = self._clock.now()
        first = load.outlook.first
        until = load.until[start - first : end - first]
        if min(until) <= now:  # expired on the way: what is served must not be
            end = start + next(i for i, at in enumerate(until) if at <= now)
            load.stop()
            sequence.metrics.miss = str(Miss(MissReason.EXPIRED, end))
            if end == start:
                return
        self._cache.set_expiry(sequence.row, start, np.array(until[: end - start]))
        self._place(load, start, end)
        tokens = end * self._size - sequence.num_computed
        sequence.num_computed = end * self._size
        load.num_taken += end - start
        sequence.attestation.tokens_loaded += tokens
        did = sequence.attestation.did
        did[self.method.name] = did.get(self.method.name, 0) + tokens
        sequence.metrics.num_cached_tokens += tokens
        if not self.method.by_layer:
            self._cache.commit(np.array([sequence.row]), np.array([sequence.num_computed]))

    def _place(self, load: Load, start: int, end: int) -> None:
        """Loaded tokens have their positions, and have received no attention of this request."""
        if not self._arena.columns:
            return
        ids = torch.from_numpy(load.blocks[start - load.outlook.first : end - load.outlook.first])
        if "positions" in self._arena.columns:
            column = self._arena.by_block("positions")
            values = torch.arange(start * self._size, end * self._size, dtype=column.dtype, device=column.device)
            column[ids.to(column.device)] = values.view(end - start, 1, self._size)
        if "mass" in self._arena.columns:
            self._arena.by_block("mass")[ids.to(self._arena.keys.device)] = 0.0

    def _abandon(self, load: Load) -> None:
        late = Fault(FaultKind.LATE, f"nothing came for {self._deadline_s:g} s")
        for name in load.abandon(late):
            for tier in self.hierarchy.tiers:
                if tier.name == name:
                    tier.breaker.failure(late)

    def limit(self, sequence: Seq, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens of a sequence may be computed in this step; they are claimed."""
        load = self._loads.get(sequence)
        if load is None:
            return num_tokens
        if load.method.by_layer:
            return self._limit_by_layer(sequence, load, num_tokens)
        if not self._may_compute(load):
            return 0
        start, stop = sequence.num_computed // self._size, load.outlook.stop
        want = sequence.num_computed + num_tokens
        if sequence.num_computed >= stop * self._size:
            return num_tokens
        whole = max(want // self._size, start + 1)  # whole blocks: a half-computed one could not be skipped
        end = load.claim(start, min(whole, stop))
        return min(want, end * self._size) - sequence.num_computed if end < stop else num_tokens

    def _limit_by_layer(self, sequence: Seq, load: Load, num_tokens: int) -> int:
        if load.broken is not None or not self._may_compute(load):
            return 0
        expired = self._has_expired(load)
        if expired:
            sequence.metrics.miss = str(Miss(MissReason.EXPIRED, load.outlook.first))
        end = None if expired else load.join()
        if end is None:
            self._finish(sequence, load)  # no layer will come: no step may wait for one
        elif end * self._size > sequence.num_computed:
            self._take(sequence, load, end)
        return min(num_tokens, sequence.num_pending)

    def _has_expired(self, load: Load) -> bool:
        """By layer: whether a block's time is over before the request counts on it, so that nothing is."""
        return not load.joined and min(load.until) <= self._clock.now()

    def _may_compute(self, load: Load) -> bool:
        try:
            return load.may_compute()
        except Exception as error:
            _log.exception("%s cannot say whether to compute", self.method.name)
            load.abandon(Fault(FaultKind.IO_ERROR, type(error).__name__))
            return False

    def note_step(self, items: Sequence[tuple[Seq, int]], seconds: float) -> None:
        """A step computed so many tokens of each sequence: what prefill costs, with all that runs beside it."""
        prompts = [(s, n) for s, n in items if s.phase is Phase.PREFILL]
        num_tokens = sum(n for _, n in prompts)
        if num_tokens:
            context = sum(s.num_computed * n for s, n in prompts) // num_tokens
            self.hierarchy.rates.prefill.observe(num_tokens, context, seconds)
        for sequence, n in prompts:
            if (load := self._loads.get(sequence)) is not None:
                load.note_step(n, seconds)

    def gates(self, sequences: Sequence[Seq]) -> list[Callable[[int], bool]]:
        """For each layer-wise load among these sequences: wait for a layer before it is read."""
        loads = [load for s in sequences if (load := self._loads.get(s)) is not None and load.method.by_layer]
        return [lambda layer, load=load: load.wait_for_layer(layer, self._deadline_s) for load in loads]  # type: ignore[misc]

    def is_broken(self, sequence: Seq) -> bool:
        """Whether what the sequence has computed on top of a layer-wise load is worth nothing."""
        load = self._loads.get(sequence)
        return load is not None and load.broken is not None

    def wait(self) -> None:
        """Nothing can be computed now: wait for news of a load."""
        self.driver.wait(list(self._loads.values()), _WAIT_S)

    # -- ends ---------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Seq, load: Load) -> None:
        del self._loads[sequence]
        load.stop()
        sequence.metrics.load = self._report(load)
        if miss := load.miss():
            sequence.metrics.miss = str(miss)
        self._leave(load)

    def prefilled(self, sequence: Seq) -> None:
        """The sequence's prefill has ended: its load no longer holds the blocks, which are about to be rearranged."""
        load = self._loads.get(sequence)
        if load is not None and load.broken is None:
            self._finish(sequence, load)

    def cancel(self, sequence: Seq) -> None:
        """The sequence goes: its load ends as soon as the transfer under way does."""
        load = self._loads.pop(sequence, None)
        if load is not None:
            load.stop()
            if load.broken is not None:
                self._take_back(sequence, load)
            elif sequence.num_computed >= load.outlook.stop * self._size:
                sequence.metrics.load = self._report(load)  # it ended with the step that finished the load
            self._leave(load)

    def stop_purged(self) -> None:
        """Blocks were purged: what is loaded from such is for its request alone from now on, and no more is loaded."""
        for sequence, load in self._loads.items():
            assert sequence.row is not None
            if any(self._is_purged(block) for block in load.stored):
                self._cache.keep_private(sequence.row)
                load.stop()

    def _is_purged(self, block: StoredBlock) -> bool:
        tier = block.tiers[block.best]
        assert tier is not None
        miss = self.hierarchy.tiers[tier].miss(self.hierarchy.record_key(block.key, block.best), 0)
        return miss is not None and miss.reason is MissReason.PURGED

    def _take_back(self, sequence: Seq, load: Load) -> None:
        """What was loaded is worth nothing: the request starts over, and was served none of it."""
        tokens, load.num_taken = load.num_taken * self._size, 0
        if tokens:
            sequence.attestation.tokens_loaded -= tokens
            sequence.attestation.did[self.method.name] -= tokens
        sequence.metrics.num_cached_tokens -= tokens
        sequence.metrics.load = self._report(load)
        if miss := load.miss():
            sequence.metrics.miss = str(miss)

    @property
    def num_leaving(self) -> int:
        """Loads whose requests have gone, and whose transfers still hold blocks."""
        return len(self._leaving)

    def wait_for_blocks(self) -> None:
        """Nothing can go on before blocks that a transfer holds come back: wait a moment for one."""
        if self._leaving:
            first = self._leaving[0]
            with first.news:
                first.news.wait_for(lambda: first.is_over, _WAIT_S)
            self._free_leaving()
        else:
            self.hierarchy.flush(_WAIT_S)

    def _leave(self, load: Load) -> None:
        if load.is_over:
            self._cache.let_go(load.blocks)
        else:
            self._leaving.append(load)

    def _report(self, load: Load) -> LoadReport:
        size, outlook = self._size, load.outlook
        actual_s = self._clock.now() - load.started
        compute_s, load_s = estimate_both(outlook)[0], load.seconds_for_all()
        return LoadReport(
            decision=str(load.decision),
            tokens_loaded=load.num_taken * size,
            tokens_computed=(outlook.stop - outlook.first - load.num_taken) * size,
            compute_s=compute_s,
            load_s=load_s,
            actual_s=actual_s,
            regret_s=None if compute_s is None or load_s is None else regret(actual_s, compute_s, load_s),
        )

    def close(self) -> None:
        """Stop all loads; the hierarchy is closed by its owner."""
        for sequence in list(self._loads):
            self.cancel(sequence)
