"""What follows a forward pass: new tokens, samples that fork, ends, and what the caller is told."""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from kvwise.core.clock import Clock
from kvwise.core.errors import CapacityError, RequestError
from kvwise.core.output import FinishReason, HeadReport, RequestOutput
from kvwise.engine.batch import Batch
from kvwise.engine.placement.choose import Memory
from kvwise.engine.runner import finite_rows
from kvwise.engine.sampler import sample
from kvwise.engine.scheduler import Scheduler
from kvwise.engine.sequence import Phase, Sequence
from kvwise.models.loaded import LoadedModel


class Finisher:
    """Carries requests over the end of a step."""

    def __init__(self, memory: Memory, scheduler: Scheduler, loaded: LoadedModel, clock: Clock) -> None:
        self._memory = memory
        self._scheduler = scheduler
        self._clock = clock
        self._eos = frozenset(loaded.eos_token_ids)

    # -- after the forward pass ---------------------------------------------------------------------------------

    def drop_unsound(self, batch: Batch, logits: Tensor) -> list[tuple[Sequence, int]]:
        """End every request whose KV or logits are not finite, before they can be shared or sampled.

        The others that are to be sampled are returned with their row of logits.
        """
        for item, fine in zip(batch.order, _sound(batch), strict=True):
            if not fine and item.sequence.row is not None:
                self.end(item.sequence, FinishReason.ERROR, "the model's keys and values are not finite numbers")
        sound = []
        for row, (item, fine) in enumerate(zip(batch.sampled, finite_rows(logits), strict=True)):
            if item.sequence.row is None:
                continue  # it has ended, or must start over
            if fine:
                sound.append((item.sequence, row))
            else:
                self.end(item.sequence, FinishReason.ERROR, "the model's logits are not finite numbers")
        return sound

    def fail(self, failures: Many[tuple[Sequence, Exception]]) -> None:
        """End requests that something raised for."""
        for sequence, error in failures:
            if sequence.phase is not Phase.FINISHED:
                self.end(sequence, FinishReason.ERROR, f"{type(error).__name__}: {error}")

    def take_tokens(self, sampled: list[tuple[Sequence, int]], logits: Tensor) -> None:
        """Sample a token for each (sequence, row of logits), then let finished prefills fork and settle."""
        for sequence, _ in sampled:
            if sequence.params.max_tokens == 0 and sequence.phase is not Phase.FINISHED:
                self.end(sequence, FinishReason.LENGTH)  # only its prompt was to be computed
        sampled = [(s, row) for s, row in sampled if s.phase is not Phase.FINISHED]
        fresh = [s for s, _ in sampled if s.phase is Phase.PREFILL]
        rows = list(sampled)
        for sequence, row in sampled:
            rows += [(twin, row) for twin in self._fork(sequence)]
        if not rows:
            return
        try:
            index = [row for _, row in rows]
            picked = logits if index == list(range(len(logits))) else logits[torch.tensor(index, device=logits.device)]
            chosen = sample(picked, [s.sampler for s, _ in rows])
        except Exception as error:  # the memory gave out: those that wait, or are in mid-prompt, go on
            self.fail([(s, error) for s, _ in rows])
            return
        now = self._clock.now()
        for (sequence, row), found in zip(rows, chosen, strict=True):
            if not self._observed(sequence, logits[row]):
                continue
            if isinstance(found, RequestError):
                self.end(sequence, FinishReason.ERROR, str(found))
                continue
            if found.logprob is not None:
                sequence.logprobs.append(found.logprob)
            self._append(sequence, found.token_id, now)
        for sequence in [*fresh, *(s for s, _ in rows[len(sampled) :])]:
            if sequence.phase is Phase.DECODE and self._memory.placement.settles:
                self._settle(sequence)

    def _observed(self, sequence: Sequence, logits: Tensor) -> bool:
        """Show the logits to whoever asked; False if that, or an abort from within it, has ended the request."""
        if sequence.observe is not None and sequence.phase is not Phase.FINISHED:
            try:
                sequence.observe(sequence.index, sequence.num_outputs, logits)
            except Exception as error:  # the caller's code: it may raise anything, and the others go on
                self.fail([(sequence, error)])
        return sequence.phase is not Phase.FINISHED

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """The other samples of a request whose prompt is computed: they share its blocks, or queue up for their own."""
        twins = []
        for sibling in sequence.siblings:
            if self._share(sequence, sibling):
                twins.append(sibling)
            else:
                self._scheduler.add(sibling)
        sequence.siblings = []
        return twins

    def _share(self, sequence: Sequence, sibling: Sequence) -> bool:
        assert sequence.row is not None
        if len(self._scheduler.running) >= self._scheduler.max_num_seqs or sequence.settled:
            return False
        try:
            sibling.row, moves = self._memory.cache.fork(sequence.row)
        except CapacityError:
            return False
        if not self._memory.placement.fork(sequence, sibling):
            self._memory.cache.release(sibling.row)
            sibling.row = None
            return False
        self._copy_blocks(moves)
        sibling.num_computed = sequence.num_computed
        sibling.phase = Phase.PREFILL
        sibling.metrics.first_scheduled = sequence.metrics.first_scheduled
        sibling.metrics.num_cached_tokens = sequence.num_prompt
        sibling.attestation.tokens_reused += sequence.num_prompt
        self._scheduler.running.append(sibling)
        return True

    def _copy_blocks(self, moves: Many[tuple[int, int]]) -> None:
        layout, arena = self._memory.layout, self._memory.arena
        inside = torch.arange(layout.pages_per_block, device=arena.keys.device)
        for source, target in moves:
            pages = [block * layout.pages_per_block + inside for block in (source, target)]
            for column in (arena.keys, arena.values, *arena.columns.values()):
                self._memory.kernels.copy_pages(column, pages[0], column, pages[1])

    def _settle(self, sequence: Sequence) -> None:
        """Hand a sequence to the placement; the latest others make room if there is none. Only it may fail."""
        self._scheduler.offer_rest(sequence)
        if self._memory.loads is not None:
            self._memory.loads.prefilled(sequence)
        try:
            while not self._memory.placement.settle(sequence):
                other = self._scheduler.latest(besides=sequence)
                if other is None and self._scheduler.wait_for_blocks():
                    continue
                if other is None:
                    raise CapacityError("no memory is left to rearrange the request's KV: raise kv_cache_memory_bytes")
                self._scheduler.preempt(other)
            sequence.settled = True
        except Exception as error:  # a method is somebody's code: it may raise anything, and the others go on
            self.fail([(sequence, error)])

    # -- tokens and ends ----------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: int, now: float) -> None:
        sequence.tokens.append(token)
        sequence.sampler.accept(token)
        sequence.phase = Phase.DECODE
        metrics = sequence.metrics
        metrics.token_times.append(now)
        if metrics.first_token is None:
            metrics.first_token = now
        reason = self._reason(sequence, token)
        if reason is not None:
            self.end(sequence, reason)

    def _reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Why this token is the last, or None. A token that ends the output is no text of it."""
        params = sequence.params
        given = sequence.num_outputs <= params.num_forced
        early = given or sequence.num_outputs < params.min_tokens
        ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        if ends and not early:
            return FinishReason.STOP
        sequence.output.add([token], given=given)
        if sequence.output.stop is not None and not early:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.num_outputs >= params.max_tokens else None

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence in any phase: its memory is free at once, and so are samples that wait for it."""
        if sequence in self._scheduler.waiting:
            self._scheduler.waiting.remove(sequence)
        if sequence.params.explain and sequence.row is not None:
            sequence.attestation.heads = self._explained(sequence)
        self._scheduler.release(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        sequence.error = error
        sequence.metrics.finished = self._clock.now()
        sequence.output.finish()
        for sibling in sequence.siblings:
            self.end(sibling, reason, error)
        sequence.siblings = []

    def _explained(self, sequence: Sequence) -> list[list[HeadReport]]:
        if sequence.settled:
            return self._memory.placement.explain(sequence)
        layout = self._memory.layout
        held = list(range(sequence.num_computed))
        return [[HeadReport(held) for _ in range(layout.num_kv_heads)] for _ in range(layout.num_layers)]

    def refuse_stuck(self, sequence: Sequence) -> None:
        """The first request in the queue cannot start though nothing runs: it never will."""
        self.end(
            sequence,
            FinishReason.ERROR,
            f"{len(sequence.tokens)} tokens do not fit the KV memory even alone: raise kv_cache_memory_bytes",
        )

    def output(self, sequence: Sequence) -> RequestOutput:
        """Tell the news of a sequence."""
        outputs = sequence.tokens[sequence.num_prompt :]
        told = sequence.num_emitted
        sequence.num_emitted = len(outputs)
        sequence.told = sequence.phase is Phase.FINISHED
        sequence.attestation.tokens_seen = max(sequence.attestation.tokens_seen, sequence.num_computed)
        return RequestOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            prompt_token_ids=sequence.prompt,
            token_ids=outputs,
            new_token_ids=outputs[told:],
            text=sequence.output.text,
            finish_reason=sequence.finish_reason,
            error=sequence.error,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
            metrics=sequence.metrics,
            attestation=sequence.attestation,
        )


def _sound(batch: Batch) -> list[bool]:
    """For each sequence of the batch, whether all its new tokens have finite KV."""
    sound = batch.step.sound
    if sound is None or bool(sound.all()):
        return [True] * len(batch.order)
    parts = torch.split(sound, [s.num_tokens for s in batch.order])
    return [bool(part.all()) for part in parts]
